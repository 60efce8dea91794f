"""Seconds of engines as workers are going to call them: warm, whole micro-batches, with others at work beside them."""

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from pipeline.engines.cost import (
    Segment,
    batch_of,
    call_engine,
    rows_of,
)
from pipeline.planning.costs import Measured, Timing
from pipeline.planning.engine_traits import TRAITS
from pipeline.planning.verdict import EngineSizes
from pipeline.problem.contexts import exact_kernels
from pipeline.problem.problem import PlacedProblem

FEWER = 8  # times, rows of the other call that is timed
REPEATED = 2  # since the first finds the memory it needs
LEAST_UNITS = 8  # at a time: products of few run slower
TIMINGS_SECONDS = 4.0  # of all that are timed, at most,
TIMINGS_SHARE = 0.02  # and no more than this share of what all rows take
CALLS = 3  # of the longest, that they have room for
SHORT_SECONDS = 0.5  # of all rows, below which what sizes were chosen by has to do: four calls would take longer


def time_calls(
    placed: PlacedProblem,
    segments: Sequence[Segment],
    sizes: Mapping[str, EngineSizes],
    costs: Mapping[str, Measured],
    spans: Sequence[range],
) -> dict[str, Timing]:
    """Time engines as workers are going to call them, those first that take most of the run.

    Args:
        placed: the problem in the run's type, on its device.
        segments: one for each row parameter, as wide as the plan's tiles.
        sizes: by engine.
        costs: by row parameter.
        spans: columns of tiles, from left to right.

    Returns:
        By row parameter, as far as a few seconds suffice, none of a short run; a bias has its weight's, whose calls do
        for both.
    """
    timings: dict[str, Timing] = {}
    begun, samples = time.perf_counter(), placed.problem.sample_count
    takes = {s.parameter.name: s.parameter.size * samples * costs[s.parameter.name].seconds_per_row for s in segments}
    if sum(takes.values()) < SHORT_SECONDS:
        return timings
    allowed = min(TIMINGS_SECONDS, TIMINGS_SHARE * sum(takes.values()))
    for segment in sorted(segments, key=lambda s: -takes[s.parameter.name]):
        if time.perf_counter() - begun > allowed:
            break
        if segment.leader in timings:
            timings[segment.parameter.name] = timings[segment.leader]
            continue
        size, cost = sizes[segment.engine], costs[segment.parameter.name]
        if cost.seconds_per_row * size.microbatch * segment.unit_rows > allowed / CALLS:
            continue  # not even its shortest call has room; what was measured with fewer samples has to do
        with suppress(torch.OutOfMemoryError):  # a worker will take a smaller group; what was measured has to do
            timings[segment.parameter.name] = _timing(placed, segment, size, cost, spans, allowed / CALLS)
    return timings


def _timing(
    placed: PlacedProblem,
    segment: Segment,
    size: EngineSizes,
    cost: Measured,
    spans: Sequence[range],
    allowed: float,
) -> Timing:
    """Time a call with few rows, one with as many as some seconds allow, and few rows against other columns."""
    affordable = int(allowed / (cost.seconds_per_row * size.microbatch)) // segment.unit_rows
    most = max(affordable, LEAST_UNITS) * segment.unit_rows
    rows = rows_of(placed, segment, size.row_group)[:most]
    few = rows[: max(1, len(rows) // FEWER // segment.unit_rows) * segment.unit_rows]
    batch = batch_of(placed, size.microbatch)
    others = _against_others(segment, spans)
    widest = max(len(each.cols) for each in (segment, *others))
    out = torch.zeros(len(rows), widest, dtype=placed.dtype, device=placed.device)

    def seconds(span: range, against: Segment = segment) -> float:
        start = time.perf_counter()
        call_engine(placed, size.row_group, batch, span, against, out[: len(span), : len(against.cols)])
        return time.perf_counter() - start

    with exact_kernels(placed.problem.model):
        some = min(seconds(few) for _ in range(REPEATED))
        if len(few) == len(rows):
            call, each = 0.0, some / segment.work(rows)
        else:
            each = max(seconds(rows) - some, 0.0) / (segment.work(rows) - segment.work(few))
            call = max(some - each * segment.work(few), 0.0)
        found = {segment.cols.start: each}
        for other in others:
            some = min(seconds(few, other) for _ in range(REPEATED))
            found[other.cols.start] = max(some - call, 0.0) / other.work(few)
    return Timing(call, *zip(*sorted(found.items()), strict=True))


def _against_others(segment: Segment, spans: Sequence[range]) -> list[Segment]:
    """Return the rows against the first and the last columns that they meet in tiles."""
    # To an engine that goes by units columns are alike, and are counted. The others pull back through less of the
    # network the later in it the columns' parameters are: by half, in a small convolutional one.
    if TRAITS[segment.engine].by_units:
        return []
    first = segment.parameter.span.start
    met = [range(max(span.start, first), span.stop) for span in spans if span.stop > first]
    ends = {cols.start: cols for cols in (met[0], met[-1])}
    return [replace(segment, cols=cols) for start, cols in ends.items() if start != segment.cols.start]


def seconds_of(call: Callable[[], object]) -> float:
    """Time a call, the faster of two: the first finds the memory it needs."""

    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return min(once(), once())


@contextmanager
def rivals(count: int, work: Callable[[], object]) -> Iterator[None]:
    """Have processes do some work, again and again, while something is timed that will not be alone in the run either.

    Args:
        count: of them, forks of this process; none where there is no fork.
        work: on a CPU.
    """
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that a fork does not have: it needs none
        children = [_rival(parent, work) for _ in range(count if hasattr(os, "fork") else 0)]
    try:
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _rival(parent: int, work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            while os.getppid() == parent:
                work()
        finally:
            os._exit(1)  # whatever it is: the parent does the same, and will say
    return child
