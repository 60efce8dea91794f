"""The engine for weights that are applied as linear maps z = a W' + b, by matrix products over samples and positions.

A row of W, and the gradient it belongs to, factorise: dL / dW_ij = sum_n delta_ni a_nj with delta = dL / dz. Hence, for
columns that are entries (p, k) of such a weight as well, with input a' and delta', applied at the same place or later,

    H[(i, j), (p, k)] = sum_n a_nj a'_nk (d delta'_np / d z_ni)  +  sum_n a_nj delta'_np (d a'_nk / d z_ni),

where the second term is zero at the same place. For weights applied several times (recurrent nets, tied layers) it is
the sum over pairs of places; positions (of sequences, images) are summed over as samples are; a convolution's input is
made of patches, an embedding's of one-hot vectors. This needs double backward in the T d_out directions of z,
T positions, instead of the d_out d_in of W; all that is left are matrix products (`products`), and additions at tokens.
It is second-order back-propagation by stages (Mizutani, Dreyfus and Demmel, 2005).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from pipeline.engines.jacrev import Jacrev
from pipeline.engines.products import Workspace, add_product, add_symmetric, places_among, tangents, tangents_at
from pipeline.engines.stages import ByPlace, NotFactoredError, Piece, Stage, Stages
from pipeline.planning.parameters import Parameter
from pipeline.problem.batches import Batch
from pipeline.problem.problem import PlacedProblem
from pipeline.problem.read_once import ReadOnce

# Of units at all positions, pulled back together: what they leave must stay in a CPU's cache, or fill a GPU.
DIRECTIONS = {"cpu": 32, "cuda": 1024}
SPARSE = 4  # times fewer inputs than all that depend on a unit: then only these are multiplied


@dataclass(frozen=True)
class Factored:
    """Rows of weights and biases of dense layers, convolutions and embeddings.

    Columns of all other parameters are left to `Jacrev`, from whichever side has fewer entries.

    Attributes:
        problem: the problem.
        row_group: units of a layer whose directions are pulled back, and multiplied, together; fewer where each has
            many positions. Rows of `Jacrev`.
        seen: batches that rows were added of, whose stages serve others.
        splits: whether products are taken apart for tensor cores; see `Workspace`.
    """

    problem: PlacedProblem
    row_group: int
    seen: dict[int, tuple[Batch, Stages]] = field(default_factory=dict)
    splits: bool = False

    def add(self, batch: Batch, rows: range, cols: range, out: Tensor) -> None:
        """Add one micro-batch's part of H[rows, cols]; see `Engine.add`.

        Raises:
            NotFactoredError: rows are of a parameter that is used in other ways, or not cheaper so.
        """
        if not self.problem.problem.is_cuttable:
            raise NotFactoredError("samples act on each other")
        stages, layout = self._stages(batch), self.problem.layout
        matrix = _Matrix(rows, cols, out, Workspace(splits=self.splits))
        here = [stage for p, span in layout.segments(rows) for stage in stages.stages(p, span)]
        for row in here:
            stages.require_fewer_directions(row.name)
        there = [stage for p, span in layout.segments(cols) for stage in _worthwhile(stages, p, span, here)]
        for place, found in _by_place(here).items():
            self._add_stages(stages, found, [c for c in there if c.place >= place], matrix)
        # Where the rows' input depends on the columns, the other way round.
        for place, found in _by_place(there).items():
            self._add_stages(stages, found, [r for r in here if r.place > place], matrix.mirrored())
        factored = {column.name for column in there}
        rows_at_a_time = self.row_group * max((row.positions for row in here), default=1)
        for span in _joined(span for p, span in layout.segments(cols) if p.name not in factored):
            self._add_general(batch, rows, span, rows_at_a_time, matrix.part(rows, span))

    def _stages(self, batch: Batch) -> Stages:
        if id(batch) not in self.seen:
            self.seen[id(batch)] = batch, Stages(self.problem, batch)
        return self.seen[id(batch)][1]

    def _add_general(self, batch: Batch, rows: range, cols: range, row_group: int, out: Tensor) -> None:
        """Add columns of parameters that do not factorise, in groups of rows or of columns."""
        engine = Jacrev(self.problem, row_group)
        if len(cols) >= len(rows):
            engine.add(batch, rows, cols, out)
            return
        for start in range(0, len(cols), row_group):  # a few at a time: the rows may be those of a whole tile
            some = cols[start : start + row_group]
            mirror = out.new_zeros(len(some), len(rows))
            engine.add(batch, some, rows, mirror)
            out[:, start : start + len(some)] += mirror.T

    def _add_stages(self, stages: Stages, rows: list[Stage], cols: list[Stage], matrix: "_Matrix") -> None:
        """Add rows of one place, a weight's and a bias's, against columns of that and later ones."""
        if not cols:
            return
        places, place = sorted({column.place for column in cols}), rows[0].place
        deltas, pull_back = stages.deltas(places), stages.pull_back(place, places)
        pieces = [(row, piece) for row in rows for piece in row.pieces()]
        wanted = _units([piece for _, piece in pieces])
        most = DIRECTIONS[self.problem.device.type] // rows[0].positions
        together = max(1, min(self.row_group, most))  # units
        for start in range(wanted.start, wanted.stop, together):
            group = range(start, min(start + together, wanted.stop))
            found = _Derivatives(group, deltas, *pull_back(group))
            for column in cols:
                if rows[0].positions == column.positions == 1 and not (rows[0].is_embedding or column.is_embedding):
                    for row, piece in pieces:
                        part = matrix.part(row.span, column.span)[piece.entries]
                        _add_pair(row, piece, column, found, part, matrix.space, self.problem.counts)
                else:
                    _add_positions(pieces, column, found, matrix)


def _worthwhile(stages: Stages, parameter: Parameter, span: range, rows: list[Stage]) -> list[Stage]:
    """Return columns at their places; none where directions to be pulled back from there outnumber the rows."""
    if not stages.is_factored(parameter.name):
        return []
    found = stages.stages(parameter, span)
    before = [column for column in found if any(row.place > column.place for row in rows)]
    directions = sum(column.positions * len(_units(list(column.pieces()))) for column in before)
    return found if directions <= len({row for stage in rows for row in stage.span}) else []


@dataclass(frozen=True)
class _Matrix:
    """Entries of H with the flat indices of their rows and columns, and memory to compute them in."""

    rows: range
    cols: range
    values: Tensor
    space: Workspace

    def part(self, rows: range, cols: range) -> Tensor:
        """Return the entries at some rows and columns."""
        r, c = self.rows.start, self.cols.start
        return self.values[rows.start - r : rows.stop - r, cols.start - c : cols.stop - c]

    def mirrored(self) -> "_Matrix":
        """Return the transpose."""
        return _Matrix(self.cols, self.rows, self.values.T, self.space)


class _Derivatives:
    """What is pulled back from some units of the rows.

    Args:
        units: i.
        delta: dL / dz', by place.  # shape: (samples, positions', outputs')
        dz: d delta' / d z_i, by place.  # shape: (units, positions, samples, positions', outputs')
        da: d a' / d z_i, by place; none of the rows' own.  # shape: (units, positions, samples, positions', inputs')
    """

    def __init__(self, units: range, delta: ByPlace, dz: ByPlace, da: ByPlace) -> None:
        self.units, self.delta, self.dz, self.da = units, delta, dz, da
        self._active: ByPlace = {}

    def active(self, place: int) -> Tensor:
        """Return whether an input at a place depends on a unit at all.  # shape: (units, inputs')."""
        if place not in self._active:
            values = self.da[place].flatten(1, 3)
            self._active[place] = (values.amax(1) != 0) | (values.amin(1) != 0)
        return self._active[place]


def _add_pair(
    row: Stage,
    piece: Piece,
    column: Stage,
    found: _Derivatives,
    out: Tensor,
    space: Workspace,
    counts: ReadOnce | None,
) -> None:
    """Add a piece of the rows, as far as its units are pulled back, against the columns of one stage.

    Args:
        row: applied once to each sample.
        piece: of it.
        column: applied once to each sample.
        found: of some units.
        out: changed in place.  # shape: (piece, columns)
        space: to work in.
        counts: bounds of how many inputs depend on a unit; None has them read.
    """
    units = range(max(found.units.start, piece.units.start), min(found.units.stop, piece.units.stop))
    if not units:
        return
    of_group = slice(units.start - found.units.start, units.stop - found.units.start)
    of_piece = slice(units.start - piece.units.start, units.stop - piece.units.start)
    dz, left, right = found.dz[column.place][of_group, 0, :, 0], row.input[:, 0], column.input[:, 0]
    for other in column.pieces():
        part = out[:, other.entries].unflatten(0, (len(piece.units), -1)).unflatten(2, (len(other.units), -1))
        outputs = slice(other.units.start, other.units.stop)
        if row.name == column.name and row.place == column.place and part.shape[1] == part.shape[3] == left.shape[1]:
            add_symmetric(part, left, dz[:, :, outputs], units, piece.units, other.units, space)
            continue
        a, b = left[:, _slice(piece.inputs)], right[:, _slice(other.inputs)]
        add_product(part[of_piece], a, b, dz[:, :, outputs], space)
        if column.is_weight and column.place in found.da:
            da = found.da[column.place][of_group, 0, :, 0, _slice(other.inputs)]
            active = found.active(column.place)[of_group, _slice(other.inputs)]
            most = _most(active, found.active(column.place), (row.place, column.place), counts)
            _add_second(part[of_piece], a, found.delta[column.place][:, 0, outputs], da, active, most, space)


def _add_positions(pieces: list[tuple[Stage, Piece]], column: Stage, found: _Derivatives, matrix: _Matrix) -> None:
    """Add pieces of rows of one place, as far as their units are pulled back, where either is applied at positions."""
    for other in column.pieces():
        for unit in found.units:
            Y = _tangents(column, other, found, unit, matrix.space)
            for row, piece in pieces:
                if unit in piece.units:
                    rows = matrix.part(row.span, column.span)[piece.entries, other.entries]
                    _contract(row, piece, unit, Y, rows, matrix.space)


def _tangents(column: Stage, piece: Piece, found: _Derivatives, unit: int, space: Workspace) -> Tensor:
    """Differentiate each sample's gradient of a piece of the columns in a unit's directions, one for each position.

    Returns:
        The derivatives.  # shape: (samples * positions, piece)
    """
    k, outputs, inputs = found.units.index(unit), _slice(piece.units), _slice(piece.inputs)
    dz = found.dz[column.place][k, ..., outputs]
    if column.is_embedding:
        return tangents_at(column.input, piece.inputs, dz)
    da = found.da.get(column.place) if column.is_weight else None
    delta = found.delta[column.place][..., outputs]
    return tangents(column.input[..., inputs], dz, delta, None if da is None else da[k, ..., inputs], space)


def _contract(row: Stage, piece: Piece, unit: int, Y: Tensor, rows: Tensor, space: Workspace) -> None:
    """Sum tangents over samples and positions, times the input of a unit of the rows.

    Args:
        row: the rows.
        piece: of them.
        unit: of it.
        Y: the tangents.  # shape: (samples * positions, columns)
        rows: changed in place.  # shape: (piece, columns)
        space: to work in.
    """
    k = unit - piece.units.start
    if row.is_embedding:
        place, known = places_among(row.input.flatten(), piece.inputs)
        rows[k :: len(piece.units)].index_add_(0, place, Y.masked_fill(~known[:, None], 0))
    else:
        a = row.input[..., _slice(piece.inputs)].flatten(0, 1)
        space.multiply(a.T, Y, rows[k * a.shape[1] : (k + 1) * a.shape[1]], adds=True)


def _most(some: Tensor, active: Tensor, places: tuple[int, int], counts: ReadOnce | None) -> int:
    """Count the inputs that depend on a unit: the most of any unit.

    Args:
        some: of the inputs and units: whether they do.  # shape: (units, inputs')
        active: of all.  # shape: likewise
        places: of rows and columns.
        counts: bounds; None has the number read.

    Returns:
        The number, or a bound of it.
    """
    if counts is None:
        return int(some.sum(1).max())
    return min(counts.bound(places, active.sum(1).max(), active.shape[1]), some.shape[1])


def _add_second(out: Tensor, a: Tensor, delta: Tensor, da: Tensor, active: Tensor, most: int, space: Workspace) -> None:
    """Add out[i, j, p, k] += sum_n a[n, j] delta[n, p] da[i, n, k].

    Args:
        out: changed in place.  # shape: (units, inputs, units', inputs')
        a: of the rows.  # shape: (samples, inputs)
        delta: of the columns.  # shape: (samples, units')
        da: of the columns in the directions of units.  # shape: (units, samples, inputs')
        active: where da is not all zero.  # shape: (units, inputs')
        most: inputs of any unit, of which this is so.
        space: to work in.
    """
    if most * SPARSE > len(active[0]):
        add_product(out.transpose(2, 3), a, delta, da, space)
    elif most:
        # An activation makes each input of the next layer depend on one unit: all others would add zeros.
        chosen = active.float().topk(most).indices  # shape: (units, most)
        few = da.gather(2, chosen[:, None].expand(-1, da.shape[1], -1))
        added = out.new_zeros(*out.shape[:2], most, out.shape[2])
        add_product(added, a, delta, few, space)
        for unit, inputs, values in zip(out, chosen, added.transpose(2, 3), strict=True):
            unit.index_add_(2, inputs, values)


def _by_place(stages: list[Stage]) -> dict[int, list[Stage]]:
    """Group a weight and a bias that are applied together."""
    places: dict[int, list[Stage]] = {}
    for stage in stages:
        places.setdefault(stage.place, []).append(stage)
    return places


def _units(pieces: list[Piece]) -> range:
    """Return the units of all pieces, and what is between them."""
    return range(min(piece.units.start for piece in pieces), max(piece.units.stop for piece in pieces))


def _joined(spans: Iterable[range]) -> list[range]:
    """Join spans that touch."""
    joined: list[range] = []
    for span in spans:
        if joined and joined[-1].stop == span.start:
            joined[-1] = range(joined[-1].start, span.stop)
        else:
            joined.append(span)
    return joined


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)
