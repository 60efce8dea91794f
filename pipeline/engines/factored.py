"""The engine for dense layers: rows of a weight W in z = a W' + b, applied once, by matrix products.

A row of W, and the gradient it belongs to, factorise: dL / dW_ij = sum_n delta_ni a_nj with delta = dL / dz. Hence, for
columns that are entries (p, k) of such a weight as well, with input a' and delta', applied at the same place or later,

    H[(i, j), (p, k)] = sum_n a_nj a'_nk (d delta'_np / d z_ni)  +  sum_n a_nj delta'_np (d a'_nk / d z_ni),

where the second term is zero for W itself. This needs double backward in the d_out directions of z instead of the
d_out d_in of W; all that is left are matrix products (`products`). It is second-order back-propagation by stages
(Mizutani, Dreyfus and Demmel, 2005).
"""

from dataclasses import dataclass

from torch import Tensor

from pipeline.data import Batch
from pipeline.engines.jacrev import Jacrev
from pipeline.engines.products import add_product, add_symmetric, tangents
from pipeline.engines.stages import ByPlace, NotFactoredError, Piece, Stage, Stages
from pipeline.problem import PlacedProblem

SPARSE = 4  # times fewer inputs than all that depend on a unit: then only these are multiplied


@dataclass(frozen=True)
class Factored:
    """Rows of weights and biases of dense layers, applied once, at one or more positions of each sample.

    Columns of all other parameters are left to `Jacrev`, from whichever side has fewer entries.

    Attributes:
        problem: the problem.
        row_group: units of a layer whose directions are pulled back, and multiplied, together; rows of `Jacrev`.
    """

    problem: PlacedProblem
    row_group: int

    def add(self, batch: Batch, rows: range, cols: range, out: Tensor) -> None:
        """Add one micro-batch's part of H[rows, cols]; see `Engine.add`.

        Raises:
            NotFactoredError: rows are of a parameter that is not applied once as a dense layer, or not cheaper so.
        """
        if not self.problem.problem.separable:
            raise NotFactoredError("samples act on each other")
        stages, layout = Stages(self.problem, batch), self.problem.layout
        matrix = _Matrix(rows, cols, out)
        here = [stages.stage(p, span) for p, span in layout.segments(rows)]
        for row in here:
            stages.require_cheap_rows(row.name)
        there = [stages.stage(p, span) for p, span in layout.segments(cols) if stages.is_factored(p.name)]
        for place, found in _by_place(here).items():
            self._add_stages(stages, found, [c for c in there if c.place >= place], matrix)
        # Where the rows' input depends on the columns, the other way round.
        for place, found in _by_place(there).items():
            self._add_stages(stages, found, [r for r in here if r.place > place], matrix.mirrored())
        for p, span in layout.segments(cols):
            if not stages.is_factored(p.name):
                self._add_general(batch, rows, span, matrix.part(rows, span))

    def _add_general(self, batch: Batch, rows: range, cols: range, out: Tensor) -> None:
        """Add columns of a parameter that does not factorise."""
        engine = Jacrev(self.problem, self.row_group)
        if len(cols) >= len(rows):
            engine.add(batch, rows, cols, out)
            return
        for start in range(0, len(cols), self.row_group):  # a few at a time: the rows may be those of a whole tile
            some = cols[start : start + self.row_group]
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
        wanted = range(min(piece.units.start for _, piece in pieces), max(piece.units.stop for _, piece in pieces))
        for start in range(wanted.start, wanted.stop, self.row_group):
            group = range(start, min(start + self.row_group, wanted.stop))
            found = _Derivatives(group, deltas, *pull_back(group))
            for column in cols:
                if rows[0].positions == column.positions == 1:
                    for row, piece in pieces:
                        _add_pair(row, piece, column, found, matrix.part(row.span, column.span)[piece.entries])
                else:
                    _add_positions(pieces, column, found, matrix)


@dataclass(frozen=True)
class _Matrix:
    """Entries of H with the flat indices of their rows and columns."""

    rows: range
    cols: range
    values: Tensor

    def part(self, rows: range, cols: range) -> Tensor:
        """Give the entries at some rows and columns."""
        r, c = self.rows.start, self.cols.start
        return self.values[rows.start - r : rows.stop - r, cols.start - c : cols.stop - c]

    def mirrored(self) -> "_Matrix":
        """Give the transpose."""
        return _Matrix(self.cols, self.rows, self.values.T)


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
        # Whether an input depends on a unit at all.  # shape: (units, inputs')
        self.active = {place: (values != 0).flatten(1, 3).any(1) for place, values in da.items()}


def _add_pair(row: Stage, piece: Piece, column: Stage, found: _Derivatives, out: Tensor) -> None:
    """Add a piece of the rows, as far as its units are pulled back, against the columns of one stage.

    Args:
        row: applied once to each sample.
        piece: of it.
        column: applied once to each sample.
        found: of some units.
        out: changed in place.  # shape: (piece, columns)
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
        if row.name == column.name and part.shape[1] == part.shape[3] == left.shape[1]:
            add_symmetric(part, left, dz[:, :, outputs], units, piece.units, other.units)
            continue
        a, b = left[:, piece.inputs], right[:, other.inputs]
        add_product(part[of_piece], a, b, dz[:, :, outputs])
        if column.is_weight and column.place in found.da:
            da = found.da[column.place][of_group, 0, :, 0, other.inputs]
            active = found.active[column.place][of_group, other.inputs]
            _add_second(part[of_piece], a, found.delta[column.place][:, 0, outputs], da, active)


def _add_positions(pieces: list[tuple[Stage, Piece]], column: Stage, found: _Derivatives, matrix: _Matrix) -> None:
    """Add pieces of rows of one place, as far as their units are pulled back, where either is applied at positions."""
    b, delta, dz = column.input, found.delta[column.place], found.dz[column.place]
    da = found.da.get(column.place) if column.is_weight else None
    for other in column.pieces():
        outputs = slice(other.units.start, other.units.stop)
        for k, unit in enumerate(found.units):
            Y = tangents(
                b[..., other.inputs],
                dz[k, ..., outputs],
                delta[..., outputs],
                None if da is None else da[k, ..., other.inputs],
            )
            for row, piece in pieces:
                if unit in piece.units:
                    a = row.input[..., piece.inputs].flatten(0, 1)
                    first = piece.entries.start + (unit - piece.units.start) * a.shape[1]
                    part = matrix.part(row.span, column.span)[first : first + a.shape[1], other.entries]
                    part += a.T @ Y


def _add_second(out: Tensor, a: Tensor, delta: Tensor, da: Tensor, active: Tensor) -> None:
    """Add out[i, j, p, k] += sum_n a[n, j] delta[n, p] da[i, n, k].

    Args:
        out: changed in place.  # shape: (units, inputs, units', inputs')
        a: of the rows.  # shape: (samples, inputs)
        delta: of the columns.  # shape: (samples, units')
        da: of the columns in the directions of units.  # shape: (units, samples, inputs')
        active: where da is not all zero.  # shape: (units, inputs')
    """
    most = int(active.sum(1).max())
    if most * SPARSE > len(active[0]):
        add_product(out.transpose(2, 3), a, delta, da)
    elif most:
        # An activation makes each input of the next layer depend on one unit: all others would add zeros.
        chosen = active.float().topk(most).indices  # shape: (units, most)
        few = da.gather(2, chosen[:, None].expand(-1, da.shape[1], -1))
        added = out.new_zeros(*out.shape[:2], most, out.shape[2])
        add_product(added, a, delta, few)
        for unit, inputs, values in zip(out, chosen, added.transpose(2, 3), strict=True):
            unit.index_add_(2, inputs, values)


def _by_place(stages: list[Stage]) -> dict[int, list[Stage]]:
    """Group a weight and a bias that are applied together."""
    places: dict[int, list[Stage]] = {}
    for stage in stages:
        places.setdefault(stage.place, []).append(stage)
    return places
