"""Ways into a run, from Python and from a job spec; the same call starts one, goes on with it, or finds it finished."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar

from pipeline.analysis.hessian import Hessian
from pipeline.errors import OutputError, SpecError, VerificationError
from pipeline.planning.job_plan import JobPlan
from pipeline.planning.machine_profiles import Profile
from pipeline.planning.memory import allowed_bytes
from pipeline.preflight.devices import worker_count
from pipeline.preflight.planner import make_plan
from pipeline.problem.contexts import differentiable, unchanged
from pipeline.problem.problem import Problem
from pipeline.progress import Reporter
from pipeline.progress.bar import for_a_person
from pipeline.runs.attempt import Attempt, Outcome
from pipeline.runs.checkpoint import place_checkpoint, read_checkpoint
from pipeline.runs.executor_choice import decided, settled
from pipeline.runs.problem_factory import build_problem
from pipeline.spec import EngineName, ExecutorName, FormatName, JobSpec, Settings, parse
from pipeline.storage.filesystems import endpoint_for
from pipeline.storage.output import Output

if TYPE_CHECKING:
    import torch

NOT_SETTINGS = frozenset({"problem", "output", "check", "overwrite", "progress"})  # but arguments of `compute_hessian`
Given = ParamSpec("Given")
Result = TypeVar("Result")


def _of_a_problem(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Say to whoever gives model, loss and data, as to other libraries, what to write; Python would count arguments."""

    @wraps(function)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        given = (*args, *kwargs.values())
        if given and not isinstance(args[0] if args else kwargs.get("problem"), Problem):
            raise SpecError(
                f"{function.__name__}: got {type(given[0]).__name__}, expected a pipeline.Problem: write "
                f"{function.__name__}(Problem(model, loss, data), ...)"
            )
        return function(*args, **kwargs)

    return checked


@_of_a_problem
def compute_hessian(
    problem: Problem,
    output: str | None = None,
    *,
    params: Sequence[str] | str | None = None,
    blocks: Literal["all", "diagonal"] | Sequence[tuple[str, str]] = "all",
    engine: EngineName = "auto",
    dtype: "torch.dtype | str | None" = None,
    store_dtype: "torch.dtype | str | None" = None,
    symmetry: Literal["mirrored", "upper"] = "mirrored",
    codec: Literal["none", "lz4", "zstd"] = "lz4",
    formats: Sequence[FormatName] = ("zarr",),
    chunk: int | None = None,
    tile: tuple[int, int] | None = None,
    microbatch: int | None = None,
    row_group: int | None = None,
    executor: ExecutorName = "auto",
    workers: int | None = None,
    cpus_per_worker: int = 1,
    gpus_per_worker: float = 0.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resources: Mapping[str, float] | None = None,
    label_selector: Mapping[str, str] | None = None,
    address: str | None = None,
    memory: int | str | None = None,
    endpoint_url: str | None = None,
    concurrent_puts: int = 4,
    durable: bool = True,
    tile_deadline: float | None = None,
    verify: bool = True,
    deterministic: bool = False,
    check: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Hessian:
    """Compute the full, exact Hessian of a problem's loss: H = d2L / dtheta2, with L over all data as one batch.

    An output that is finished is opened; one that was cut off is completed, tile by tile.

    Args:
        problem: model, loss and data; left as it is.
        output: a path or an fsspec URL. None keeps the result in memory.
        params: globs of parameter names, `!glob` excludes; the problem's own selection when None.
        blocks: `"all"`, `"diagonal"`, or pairs of parameter names.
        engine: how tiles are computed; `"auto"` takes the fastest exact one for each parameter.
        dtype: computes in this type, a torch dtype or its name; the model's own when None.
        store_dtype: stores in this type; `dtype` when None.
        symmetry: stores the whole matrix, or the upper triangle of chunks.
        codec: compression of chunks.
        formats: `("zarr", "parquet")` stores Parquet files too, for readers that know tables; Zarr is always needed.
        chunk: side of a stored chunk; from P when None.
        tile: chunk rows and chunk columns of a tile; from engine and memory when None.
        microbatch: samples at a time; from memory when None.
        row_group: rows pulled back at a time, units of a layer for the factored engine; from memory when None.
        executor: Ray workers, a plain loop in this process (`"serial"`), or by `"auto"` what is going to end sooner.
        workers: Ray workers; as many as there is room for when None.
        cpus_per_worker: CPUs, and torch threads, of a Ray worker.
        gpus_per_worker: a GPU, or the fraction of one, of a Ray worker.
        device: what engines run on; `"auto"` is `"cuda"` where workers have GPUs.
        resources: further resources of a Ray worker, as nodes name theirs, by amount.
        label_selector: labels of nodes for workers, as Ray selects: `{"ray.io/accelerator-type": "in(A100, H100)"}`.
        address: Ray cluster to join; RAY_ADDRESS or a local one when None.
        memory: bytes allowed to a worker, also as `"4GiB"`; its share of what is free when None.
        endpoint_url: server of the output's bucket, S3 or Google; the cloud's own, or the environment's, when None.
        concurrent_puts: chunks that a worker encodes and puts at a time.
        durable: waits until all is on a local disk, and would survive a power cut, before it is finished.
        tile_deadline: seconds after which a worker that does not answer is replaced; from the median tile when None.
        verify: checks the finished matrix against plain double backward.
        deterministic: adds in a fixed order on GPUs too, where torch can; slower. Also on where torch is set so.
        check: reads back what is there already, finished or not, and computes again the tiles of which anything is
            missing or damaged.
        overwrite: replaces a Hessian that is there already, of whatever problem, once this one is planned.
        progress: shows steps and a bar, on a terminal or in a notebook.

    Returns:
        The Hessian.

    Raises:
        HessianError: the problem, the settings or the output cannot be used, or the result is not right; see
            `pipeline.errors` for its kinds.
    """
    values = {key: value for key, value in locals().items() if key not in NOT_SETTINGS}
    settings = parse(Settings, values, "compute_hessian")
    report = for_a_person(wanted=progress)
    return run(problem, settings, output, report=report, check=check, overwrite=overwrite).hessian


def load_problem(spec: JobSpec, folder: Path) -> Problem:
    """Build the problem a job spec names, at its checkpoint's weights, with respect to the parameters it selects.

    Args:
        spec: the job.
        folder: where the spec lies.

    Returns:
        The problem.

    Raises:
        SpecError: `checkpoint_key` says where in a checkpoint, but there is none.
        HessianError: problem or checkpoint cannot be used.
    """
    if spec.checkpoint is None and spec.checkpoint_key is not None:
        raise SpecError(f"`checkpoint_key` got {spec.checkpoint_key!r} without a `checkpoint`: give its URL")
    problem = build_problem(spec.problem, spec.problem_args, folder).select(spec.params)
    if spec.checkpoint is None:
        return problem
    endpoint_url = endpoint_for(spec.checkpoint, spec.output, spec.endpoint_url)
    return place_checkpoint(
        problem, read_checkpoint(spec.checkpoint, endpoint_url, "checkpoint_key"), spec.checkpoint_key
    )


def run_job(spec: JobSpec, folder: Path, report: Reporter, *, check: bool = False, overwrite: bool = False) -> Outcome:
    """Run a job spec.

    Args:
        spec: the job; its output must be set.
        folder: where the spec lies.
        report: told about progress.
        check: reads back what is there already.
        overwrite: replaces a Hessian that is there already.

    Returns:
        What was done.

    Raises:
        SpecError: no output is given.
    """
    if spec.output is None:
        raise SpecError("missing key `output`: say where the Hessian goes, in the spec or with --output")
    output = _writable(spec.output, spec)
    report.say(f"building {spec.problem}")
    problem = load_problem(spec, folder)
    return run(problem, spec, output, report=report, name=spec.problem, check=check, overwrite=overwrite)


def run(
    problem: Problem,
    settings: Settings,
    place: Output | str | None,
    *,
    report: Reporter | None = None,
    name: str | None = None,
    check: bool = False,
    overwrite: bool = False,
) -> Outcome:
    """Run a problem; see `compute_hessian`.

    Args:
        problem: what to compute.
        settings: how.
        place: where to: an output that was found writable, or a URL; None for memory.
        report: told about progress.
        name: of the factory that made the problem, None where the caller did.
        check: reads back what is there already.
        overwrite: replaces a Hessian that is there already.

    Returns:
        What was done.

    Raises:
        SpecError: Parquet is asked for without an output, or what is there is to be both read back and replaced.
    """
    if check and overwrite:
        raise SpecError("`check` mends what is there, `overwrite` replaces it: leave one of them out")
    if place is None and "parquet" in settings.formats:
        raise SpecError("`formats` got parquet, but no reader can reach files in this process's memory: give an output")
    if place is None:  # nothing is to survive this process
        settings = settings.model_copy(update={"durable": False})
    report = report or Reporter()
    problem = problem.select(settings.params)
    with differentiable(), unchanged(*problem.modules), _destination(place, settings) as output:
        try:
            outcome = Attempt(problem, settings, output, report, name, check=check, overwrite=overwrite).outcome()
        except VerificationError as error:
            if place is None:
                error.hessian = _kept_in_memory(error.hessian, output)
            raise
        return outcome if place is not None else replace(outcome, hessian=_kept_in_memory(outcome.hessian, output))


def plan(spec: JobSpec, folder: Path, workers: int | None = None, profile: Profile | None = None) -> JobPlan:
    """Plan a job without running it, on the cluster where it names one.

    Args:
        spec: the job.
        folder: where the spec lies.
        workers: how many, in place of the spec's; as many as a cluster has, whatever this machine is.
        profile: of the machines that they are on; None for ones like this.

    Returns:
        The plan.
    """
    elsewhere = workers is not None or profile is not None
    if elsewhere:
        memory = profile.memory_bytes if profile else allowed_bytes(None, worker_count(spec))
        changes = {"executor": "ray", "workers": workers or worker_count(spec), "memory": spec.memory or memory}
        spec = spec.model_copy(update=changes)
    problem = load_problem(spec, folder)
    if elsewhere:
        return make_plan(problem, spec, spec.problem)
    with ExitStack() as joined:
        return settled(problem, spec, spec.problem, joined)[1]


def _writable(url: str, settings: Settings) -> Output:
    """Open an output that the executor's workers can write to."""
    output = Output(url, settings.endpoint_url)
    if output.is_memory and decided(settings, in_memory=True).executor == "ray":
        raise OutputError(f"output {url}: lies in this process, where Ray workers cannot write; use executor=serial")
    output.check_writable()
    return output


@contextmanager
def _destination(place: Output | str | None, settings: Settings) -> Iterator[Output]:
    """Yield the output; for a result kept in memory, a place that the executor's workers can reach."""
    if place is not None:
        yield place if isinstance(place, Output) else _writable(place, settings)
    elif settings.executor == "serial":
        yield Output.private()
    else:
        with tempfile.TemporaryDirectory(prefix="hessian-") as folder:
            yield Output(folder)


def _kept_in_memory(hessian: Hessian, output: Output) -> Hessian:
    """Move a result into this process's memory."""
    if output.is_memory:
        return hessian
    memory = Output.private()
    memory.check_room(hessian.manifest.matrix_bytes, "give an output: a folder or a bucket,")
    for name, size in output.sizes().items():
        memory.put(name, output.get(name, size) or b"")
    return Hessian(memory, hessian.manifest)
