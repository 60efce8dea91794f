"""A short timed contest between engines that are both right, where counting operations does not tell the faster."""

import time
from collections.abc import Mapping
from dataclasses import replace

from pipeline.engines.cost import SHARED_SAMPLES, Segment, measure
from pipeline.engines.stages import Application
from pipeline.planning.engine_traits import TRAITS
from pipeline.planning.verdict import ParameterVerdict, PreflightVerdict
from pipeline.problem.problem import PlacedProblem

FEW_SAMPLES = 8  # of the first call
SECONDS = 0.04  # of a call, at most, that is repeated with more rows and samples


def take_faster(placed: PlacedProblem, verdict: PreflightVerdict, known: Mapping[str, Application]) -> PreflightVerdict:
    """Time both engines of each parameter that has a rival, and take the faster.

    Args:
        placed: the problem in the run's type, on its device.
        verdict: of preflight.
        known: how parameters are applied. A bias goes with its weight, since they share what is pulled back; parameters
            of one shape that are applied alike are timed once, but for the last: behind a head there is little to pull
            back through, and products decide.

    Returns:
        The verdict with the faster engines, and the times in what was tried.
    """
    contested = {name: found.rival for name, found in verdict.parameters.items() if found.rival}
    parameters, timed = dict(verdict.parameters), {}
    last = next((name for name in reversed(contested) if known[name].weight == name), None)
    for name, rival in contested.items():
        if known[name].weight == name or known[name].weight not in contested:
            found = parameters[name]
            alike = (placed.layout[name].shape, replace(known[name], weight=""), found.engine, rival, name == last)
            if alike not in timed:
                timed[alike] = {engine: _seconds(placed, name, engine, known) for engine in (found.engine, rival)}
            parameters[name] = _decided(found, timed[alike], placed.problem.sample_count)
    for name in contested:
        leader = known[name].weight if known[name].weight in contested else name
        parameters[name] = _led(parameters[name], parameters[leader].engine)
    return replace(verdict, parameters=parameters)


def _decided(found: ParameterVerdict, seconds: dict[str, float], samples: int) -> ParameterVerdict:
    """Take the faster engine, and note the times of both."""
    times = {engine: f"{found.tried[engine]}; {1e3 * samples * each:.3g} ms a row" for engine, each in seconds.items()}
    return replace(_led(found, min(seconds, key=lambda engine: seconds[engine])), tried=found.tried | times)


def _led(found: ParameterVerdict, engine: str) -> ParameterVerdict:
    """Take one of the two engines that are right; the other is its rival."""
    return found if engine == found.engine else replace(found, engine=engine, rival=found.engine)


def _seconds(placed: PlacedProblem, name: str, engine: str, known: Mapping[str, Application]) -> float:
    """Measure an engine per row and sample, against all columns from the diagonal on, as time and memory allow."""
    parameter, habit = placed.layout[name], TRAITS[engine].habit
    segment = Segment.of(parameter, range(parameter.offset, placed.layout.size), engine, known)
    samples, rows = SHARED_SAMPLES if segment.shares_rows else FEW_SAMPLES, habit.first_rows
    largest = habit.bytes[placed.device.type] // 4
    while True:
        # A busy machine must not decide: on a CPU its own seconds count.
        start = time.process_time()
        cost = measure(placed, segment, samples, rows)
        seconds = time.process_time() - start if placed.device.type == "cpu" else cost.seconds
        most = (
            rows >= min(segment.units, habit.most_rows[placed.device.type]) and samples >= placed.problem.sample_count
        )
        if most or seconds > SECONDS or cost.peak_bytes > largest:
            return seconds / cost.rows / cost.samples
        samples, rows = 2 * samples, 2 * rows
