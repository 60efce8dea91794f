"""Micro-batch and row group of each engine, chosen by measuring what they hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.engines.cost import (
    PROBE_SAMPLES,
    Segment,
    measure,
)
from pipeline.errors import MemoryRefusedError, human_bytes
from pipeline.planning.costs import Measured
from pipeline.planning.engine_traits import TRAITS, Habit
from pipeline.planning.verdict import EngineSizes
from pipeline.problem.batches import sample_count
from pipeline.problem.problem import PlacedProblem

PROBE_SECONDS = 5.0  # at most, of calls that are measured at the sizes chosen,
PROBE_SHARE, LEAST_SECONDS = 0.01, 0.02  # and no more than this share of what all rows take, but always as much
CALL_SECONDS = 2.0  # of one of them, beyond which it has fewer rows, and else samples, than the run's
BYTES_SECONDS = 0.5  # of a call that bytes are measured by, likewise
LEAST_SIZE, GROWTH = 2, 4  # rows and samples of the first call of all, and times as many samples of the next


@dataclass(frozen=True)
class Probed:
    """Working sizes and what was measured with them.

    Attributes:
        sizes: by engine.
        costs: by row parameter.
        engine_bytes: the largest peak.
    """

    sizes: dict[str, EngineSizes]
    costs: dict[str, Measured]
    engine_bytes: int


def choose_sizes(
    placed: PlacedProblem,
    segments: Sequence[Segment],
    budget_bytes: int,
    microbatch: int | None,
    row_group: int | None,
) -> Probed:
    """Choose micro-batch and row group of every engine by measuring.

    Args:
        placed: the problem in the run's type, on its device.
        segments: one for each row parameter.
        budget_bytes: what an engine may hold.
        microbatch: taken as it is when given.
        row_group: taken as it is when given.

    Returns:
        The sizes.

    Raises:
        MemoryRefusedError: not even one row of the smallest micro-batch fits.
    """
    by_engine: dict[str, list[Segment]] = {}
    for segment in segments:
        by_engine.setdefault(segment.engine, []).append(segment)
    sizes: dict[str, EngineSizes] = {}
    costs: dict[str, Measured] = {}
    peak = 0
    for name, own in by_engine.items():
        sizes[name], found, bytes_ = _Chooser(placed, own, budget_bytes).choose(microbatch, row_group)
        costs |= found
        peak = max(peak, bytes_)
    return Probed(sizes, costs, peak)


class _Chooser:
    """Chooses the sizes of one engine.

    Args:
        placed: the problem.
        segments: one for each row parameter of the engine.
        budget_bytes: what it may hold.
    """

    def __init__(self, placed: PlacedProblem, segments: Sequence[Segment], budget_bytes: int) -> None:
        self._placed, self._segments, self._budget = placed, segments, budget_bytes
        self._engine = segments[0].engine
        # The one with the most columns, and of these with the longest unit, needs the most memory.
        self._widest = max(segments, key=lambda s: (len(s.cols), s.unit_rows))
        self._largest = max(sample_count(batch) for batch in placed.problem.batches)

    def choose(self, microbatch: int | None, row_group: int | None) -> tuple[EngineSizes, dict[str, Measured], int]:
        """Choose; see `choose_sizes`."""
        habit, cuttable = TRAITS[self._engine].habit, self._placed.problem.is_cuttable
        fixed = min(microbatch or self._largest, self._largest) if cuttable else self._largest
        may_cut = cuttable and microbatch is None
        target = min(self._budget, habit.bytes[self._placed.device.type])
        rows, most = row_group or habit.most_rows[self._placed.device.type], self._largest if may_cut else fixed
        model = _BytesModel.fit(self._placed, self._widest, most, habit, rows, target)
        while row_group is None and rows > 1 and model.most_samples(rows, target) < min(fixed, habit.enough_samples):
            rows //= 2
        samples = max(1, min(fixed, model.most_samples(rows, target))) if may_cut else fixed
        samples = math.ceil(fixed / math.ceil(fixed / samples))  # as few micro-batches, of one size
        while True:
            try:
                costs = self._costs(samples, rows, model.row_seconds)
                peak, widest = max(cost.peak_bytes for cost in costs.values()), costs[self._widest.parameter.name]
                if samples > widest.samples or widest.rows < self._widest.rows(rows):
                    # Less was measured than is going to be asked for, of which bytes are at most in proportion.
                    more = max(samples / widest.samples, 1.0) * max(self._widest.rows(rows) / widest.rows, 1.0)
                    peak = max(peak, min(model.bytes(rows, samples), int(more * widest.peak_bytes)))
                if peak <= self._budget:
                    return EngineSizes(samples, rows), costs, peak
            except torch.OutOfMemoryError:
                peak = self._budget
            if row_group is None and rows > 1:
                rows //= 2
            elif may_cut and samples > 1:
                samples //= 2
            else:
                raise MemoryRefusedError(
                    f"{rows} rows of {samples} samples need {human_bytes(peak)} in the {self._engine} engine, "
                    f"{human_bytes(max(self._budget, 0))} are left for it: raise `memory`, or lower `workers`, "
                    "`chunk`, `tile`, `row_group` or `microbatch`"
                )

    def _costs(self, samples: int, row_group: int, row_seconds: float) -> dict[str, Measured]:
        """Measure the row parameters for a few seconds, the rest is taken as their mean.

        Args:
            samples: in a micro-batch.
            row_group: rows at a time.
            row_seconds: of one more row and sample, about.

        Returns:
            By name.
        """
        # The widest is always measured: it needs the most memory. Then those with the most rows.
        costs: dict[str, Measured] = {}
        spent, each = 0.0, row_seconds
        rows, all_samples = sum(s.parameter.size for s in self._segments), self._placed.problem.sample_count
        for segment in sorted(self._segments, key=lambda s: (s is not self._widest, -s.parameter.size)):
            if costs:
                each = spent / sum(cost.rows * cost.samples for cost in costs.values())
                if spent > min(PROBE_SECONDS, max(LEAST_SECONDS, PROBE_SHARE * each * rows * all_samples)):
                    break
            if segment.leader in costs:  # a bias, whose weight's calls do for both
                costs[segment.parameter.name] = costs[segment.leader]
                continue
            some, group = _affordable(segment, min(samples, PROBE_SAMPLES), row_group, each)
            cost = measure(self._placed, segment, some, group, counted=True)
            costs[segment.parameter.name] = cost
            spent += cost.seconds
        known = list(costs.values())
        mean = Measured(
            sum(c.rows for c in known),
            sum(c.work for c in known),
            samples,
            float(sum(c.seconds * samples / c.samples for c in known)),
            int(sum(c.flops * samples / c.samples for c in known)),
            max(c.peak_bytes for c in known),
        )
        return {s.parameter.name: costs.get(s.parameter.name, mean) for s in self._segments}


def _affordable(segment: Segment, samples: int, row_group: int, row_seconds: float) -> tuple[int, int]:
    """Return samples and rows of a call that takes no more than `CALL_SECONDS` or so, or the least there is."""
    each = max(row_seconds, 1e-12) * segment.unit_rows
    group = max(1, min(row_group, int(CALL_SECONDS / (each * samples))))
    return max(min(LEAST_SIZE, samples), min(samples, int(CALL_SECONDS / (each * group)))), group


def _marginal(less: Measured, more: Measured) -> float:
    """Return the seconds of one more row and sample: most of a small call's are no row's."""
    done = more.rows * more.samples - less.rows * less.samples
    return max(more.seconds - less.seconds, 0.0) / done if done > 0 else more.seconds_per_row


@dataclass(frozen=True)
class _BytesModel:
    """Bytes of an engine's call: fixed + rows x per_row + samples x (per_sample + rows x slope).

    Attributes:
        row_seconds: of one more row and sample.
    """

    fixed: float
    per_row: float
    per_sample: float
    slope: float
    row_seconds: float

    @classmethod
    def fit(
        cls, placed: PlacedProblem, segment: Segment, largest: int, habit: Habit, rows: int, room: int
    ) -> "_BytesModel":
        """Measure with few rows and samples; where not all may fit, with twice as many of either too.

        Args:
            placed: the problem.
            segment: the one that needs the most memory.
            largest: samples at most.
            habit: of its engine.
            rows: at most, in a group.
            room: bytes that calls may take.

        Returns:
            The model; where all fits if bytes grew with both as much as they can, that.
        """
        usual = max(1, min(habit.first_samples, largest // 2)), habit.first_rows
        few, first = min(LEAST_SIZE, usual[0]), min(LEAST_SIZE, usual[1])
        a = least = measure(placed, segment, few, first)
        for more, group in ((min(GROWTH * few, usual[0]), first), usual):
            done = segment.rows(group) * more - a.rows * a.samples
            if a.seconds + _marginal(least, a) * done > BYTES_SECONDS:
                break
            few, first = more, group
            a = measure(placed, segment, few, first)
        grown = cls(0.0, 0.0, 0.0, a.peak_bytes / few / min(first, segment.units), _marginal(least, a))
        if grown.bytes(min(rows, segment.units), largest) <= room:
            return grown
        return cls._fitted(placed, segment, (few, min(2 * few, largest)), first, a, least)

    @classmethod
    def _fitted(
        cls,
        placed: PlacedProblem,
        segment: Segment,
        samples: tuple[int, int],
        rows: int,
        a: Measured,
        least: Measured,
    ) -> "_BytesModel":
        """Measure three times more, with twice as many rows, samples and both."""
        few = samples[0]
        b, c, d = (
            measure(placed, segment, some, group)
            for some, group in ((samples[1], rows), (few, 2 * rows), (samples[1], 2 * rows))
        )
        first = min(rows, segment.units)  # there may be but one
        more, step = max(min(2 * rows, segment.units) - first, 1), max(samples[1] - few, 1)
        slope = max((d.peak_bytes - c.peak_bytes - b.peak_bytes + a.peak_bytes) / more / step, 0.0)
        per_row = max((c.peak_bytes - a.peak_bytes) / more - few * slope, 0.0)
        per_sample = max((b.peak_bytes - a.peak_bytes) / step - first * slope, 0.0)
        fixed = max(a.peak_bytes - first * per_row - few * (per_sample + first * slope), 0.0)
        return cls(fixed, per_row, per_sample, slope, _marginal(least, d))

    def bytes(self, rows: int, samples: int) -> int:
        """Return the bytes of a call."""
        return int(self.fixed + rows * self.per_row + samples * (self.per_sample + rows * self.slope))

    def most_samples(self, rows: int, target_bytes: int) -> int:
        """Return the samples that fit beside so many rows."""
        return int((target_bytes - self.fixed - rows * self.per_row) / max(self.per_sample + rows * self.slope, 1.0))
