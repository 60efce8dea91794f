"""The sections on the matrix itself: its blocks, its entries, its diagonal."""

import numpy as np

from pipeline.analysis.pictures.canvas import new_figure, take
from pipeline.analysis.pictures.maps import draw_map, painted
from pipeline.analysis.pictures.spectra import draw_diagonals
from pipeline.analysis.report.parts import Part, Table, Zoom
from pipeline.analysis.report.subject import Subject
from pipeline.errors import printable

STATIC_ROWS = 400  # of the picture that is no larger than a page

ROOT_MEAN_SQUARE = "root mean square of the entries"


def blocks_part(subject: Subject) -> Part:
    """Draw how large the blocks are."""
    H = subject.hessian
    sizes, names = H.block_sizes(), H.parameters.names
    side = min(max(4.2, 2.4 + 0.2 * len(names)), 9.0)
    with new_figure(side + 1.2, side) as figure:
        draw_map(figure.add_subplot(), sizes, names, range(len(names) + 1), ROOT_MEAN_SQUARE)
        norms = H.block_norms()
        pairs = [(i, j) for i in range(len(names)) for j in range(i, len(names)) if np.isfinite(sizes[i, j])]
        pairs.sort(key=lambda pair: -sizes[pair])
        largest = f"H[{printable(names[pairs[0][0]])}, {printable(names[pairs[0][1]])}]" if pairs else "none"
        picture = take(
            figure,
            "block_norms",
            f"Map of {len(names)} by {len(names)} blocks, one for each pair of parameters, coloured by the root mean "
            f"square of their entries. The largest is {largest}.",
        )
    return Part(
        "blocks",
        "Blocks",
        (
            "Each square is the block of two parameters, in the order of the model. Colour is the root mean square of "
            "its entries, on a logarithmic scale; wide lines are between modules.",
        ),
        (picture,),
        Table.of(
            ("rows", "columns", "entries", "root mean square", "Frobenius norm"),
            (
                (names[i], names[j], H.parameters[names[i]].size * H.parameters[names[j]].size, float(sizes[i, j]),
                 norms[names[i], names[j]])
                for i, j in pairs
            ),
        ),
    )  # fmt: skip


def entries_part(subject: Subject) -> Part:
    """Draw the matrix itself."""
    H, raster = subject.hessian, subject.raster
    small, names, fine = raster.merged(STATIC_ROWS), H.parameters.names, raster.values()
    with new_figure(8.2, 7) as figure:
        draw_map(figure.add_subplot(), small.values(), names, small.starts.tolist(), "|entry|, root mean square")
        picture = take(
            figure, "entries", f"The {H.shape[0]:,} by {H.shape[0]:,} matrix as a picture, dark small and bright large."
        )
    exact = len(fine) == H.shape[0]
    how = "a pixel for each entry" if exact else "a pixel for the root mean square of a rectangle of entries"
    scale = "" if exact else " A parameter's side grows with the root of its size, so that small ones are seen."
    below = max(0.0, 1.0 - float(np.mean(fine[np.isfinite(fine)] > 0))) if np.isfinite(fine).any() else 0.0
    rows = (
        (p.name, p.shape_text, p.offset, p.size, int(b - a))
        for p, a, b in zip(H.parameters, raster.starts, raster.starts[1:], strict=False)
    )
    return Part(
        "entries",
        "All entries",
        (
            f"|H|, {how}, on a logarithmic scale.{scale}"
            + (f" {below:.0%} of it is exactly zero." if below >= 0.005 else ""),
        ),
        (picture,),
        Table.of(("parameter", "shape", "first row", "rows", "rows of the picture"), rows),
        Zoom(painted(fine), names, raster.starts.tolist(), [p.size for p in H.parameters]),
    )


def diagonal_part(subject: Subject) -> Part:
    """Draw the second derivatives along each parameter."""
    H = subject.hessian
    if not H.has_diagonal:
        return Part("diagonal", "Diagonal", ("The run did not compute all of the diagonal.",))
    diagonal = H.unflatten(H.diagonal())
    parts = {name: d.ravel() for name, d in diagonal.items() if d.size}
    with new_figure(max(5.0, min(2.0 + 0.3 * len(parts), 14.0)), 4.6) as figure:
        draw_diagonals(figure.add_subplot(), parts)
        picture = take(
            figure, "diagonal", "Second derivatives along each parameter: the middle and nine tenths of them, by sign."
        )
    negative = sum(int((d < 0).sum()) for d in parts.values())
    return Part(
        "diagonal",
        "Diagonal",
        (
            f"The second derivative of the loss along each single weight. {negative:,} of {H.shape[0]:,} are negative. "
            "Marks are medians, bars hold nine tenths.",
        ),
        (picture,),
        Table.of(
            ("parameter", "least", "median", "largest", "negative", "zero", "trace of the block"),
            (
                (name, float(d.min()), float(np.median(d)), float(d.max()), int((d < 0).sum()), int((d == 0).sum()),
                 float(d.sum()))
                for name, d in parts.items()
            ),
        ),
    )  # fmt: skip
