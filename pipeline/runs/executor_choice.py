"""Where to compute when nobody said: in this process, or on Ray workers, whichever is going to end sooner."""

from collections.abc import Callable
from contextlib import ExitStack

from pipeline.execution.executors import Executor, Serial
from pipeline.planning.job_plan import JobPlan
from pipeline.planning.placement import asks_for_workers
from pipeline.problem.problem import Problem
from pipeline.spec import Settings

# Ray and two workers took 12 s to start on two cores; from twice as long on, two workers win that back.
SERIAL_SECONDS = 24.0


def executor_of(settings: Settings, joined: ExitStack) -> Executor:
    """Return the executor of settings that name one.

    Args:
        settings: with executor "ray" or "serial".
        joined: ends a Ray that it starts.
    """
    if settings.executor == "serial":
        return Serial(settings)
    from pipeline.cluster.executor import Cluster

    return joined.enter_context(Cluster(settings))


def decided(settings: Settings, seconds: float = 0.0, *, in_memory: bool = False) -> Settings:
    """Return settings that name an executor.

    Args:
        settings: those with executor "auto" are decided.
        seconds: that computing in this process is going to take.
        in_memory: whether the output lies in this process.
    """
    if settings.executor != "auto":
        return settings
    here = not asks_for_workers(settings) and (in_memory or settings.device == "cuda" or seconds <= SERIAL_SECONDS)
    return settings.model_copy(update={"executor": "serial" if here else "ray"})


def settled(
    problem: Problem,
    settings: Settings,
    name: str | None,
    joined: ExitStack,
    check: Callable[[], None] = lambda: None,
    *,
    in_memory: bool = False,
) -> tuple[Executor, JobPlan]:
    """Decide where to compute, and plan.

    Args:
        problem: with its parameters selected.
        settings: how to compute.
        name: of the problem, for the manifest.
        joined: ends a Ray that is started.
        check: called every few seconds; raises what stops the run.
        in_memory: whether the output lies in this process.

    Returns:
        The executor, and its plan.
    """
    first = decided(settings, in_memory=in_memory)
    executor = executor_of(first, joined)
    made = executor.plan(problem, name, check)
    if settings.executor != "auto" or first.executor == "ray":
        return executor, made
    final = decided(settings, made.makespan_seconds(), in_memory=in_memory)
    if final.executor == "serial":
        return executor, made
    executor = executor_of(final, joined)
    return executor, executor.plan(problem, name, check, made)
