"""The page on Hessians held against each other."""

from collections.abc import Mapping

import numpy as np

from pipeline.analysis.comparison import Comparison
from pipeline.analysis.pictures.canvas import new_figure, take
from pipeline.analysis.pictures.maps import draw_map
from pipeline.analysis.pictures.spectra import Vector, draw_over_each_other
from pipeline.analysis.pictures.sweeps import draw_over_steps, draw_series
from pipeline.analysis.report.parts import Page, Part, Table
from pipeline.errors import counted


def comparison_page(found: Comparison, labels: Mapping[str, str], spectra: Mapping[str, Vector]) -> Page:
    """Make the page.

    Args:
        found: what the comparison gave.
        labels: a short name for each URL.
        spectra: eigenvalues by label; all, or the outermost.

    Returns:
        The page.
    """
    first, *others = found.differences
    parts = [
        _distances(found, labels),
        *(_blocks(found, k, labels) for k in range(1, len(found.differences))),
        _spectra(spectra),
        _spaces(found, labels),
        _layers(found, labels),
    ]
    facts = [("of", labels[first.url]), ("Hessians", f"{len(found.differences)}")]
    if len(others) == 1:
        (other,) = others
        facts += [("against", labels[other.url]), ("relative distance", f"{other.distance / (first.norm or 1):.3g}"),
                  ("cosine", f"{other.cosine:.6g}"), ("shared top space", f"{other.overlap:.1%}")]  # fmt: skip
    subtitle = f"{counted(len(others), 'Hessian')} held against {labels[first.url]}"
    return Page("Hessians compared", subtitle, facts, parts)


def _distances(found: Comparison, labels: Mapping[str, str]) -> Part:
    first = found.differences[0]
    return Part(
        "distances",
        "Distances",
        ("Distance is the norm of the difference, Frobenius; cosine is of the angle between the matrices as vectors.",),
        (),
        Table.of(
            ("Hessian", "loss", "trace", "norm", "distance", "relative", "cosine", "at"),
            ((labels[d.url], d.loss, d.trace, d.norm, d.distance, d.distance / (first.norm or 1), d.cosine, d.url)
             for d in found.differences),
        ),
        unfolded=True,
    )  # fmt: skip


def _blocks(found: Comparison, k: int, labels: Mapping[str, str]) -> Part:
    d, names = found.differences[k], found.names
    side = min(max(4.2, 2.4 + 0.2 * len(names)), 9.0)
    with new_figure(side + 1.2, side) as figure:
        draw_map(figure.add_subplot(), d.relative, names, range(len(names) + 1), "|difference| / |block|")
        alt = f"Map of the relative distance of each block of {labels[d.url]} from the first Hessian's."
        picture = take(figure, f"blocks_{k}", alt)
    rows = sorted(((i, j) for i in range(len(names)) for j in range(i, len(names))), key=lambda p: -d.blocks[p])
    return Part(
        f"blocks-{k}",
        f"Blocks of {labels[d.url]}",
        ("How far each block is from the first one's, in units of the first one's.",),
        (picture,),
        Table.of(
            ("rows", "columns", "distance", "relative"),
            ((names[i], names[j], float(d.blocks[i, j]), float(d.relative[i, j])) for i, j in rows),
        ),
    )


def _spectra(spectra: Mapping[str, Vector]) -> Part:
    with new_figure(7, 4.2) as figure:
        draw_over_each_other(figure.add_subplot(), spectra)
        picture = take(
            figure, "spectra", f"Eigenvalues of {counted(len(spectra), 'Hessian')} by rank, over each other."
        )
    rows = (
        (label, len(w), float(w.min()), float(w.max()), int((w < 0).sum())) for label, w in spectra.items()
    )  # fmt: skip
    columns = ("Hessian", "eigenvalues", "least", "largest", "below zero")
    return Part("spectra", "Spectra", ("Absolute values by rank.",), (picture,), Table.of(columns, rows))


def _spaces(found: Comparison, labels: Mapping[str, str]) -> Part:
    others = found.differences[1:]
    numbers = list(range(1, len(others[0].angles) + 1))
    with new_figure(7, 3.6) as figure:
        axes = figure.add_subplot()
        draw_series(axes, numbers, {labels[d.url]: d.angles.tolist() for d in others}, "degrees")
        axes.set(xlabel="principal angle", ylim=(-2, 92))
        picture = take(figure, "angles", "Principal angles between the spaces of the top eigenvectors, in degrees.")
    return Part(
        "spaces",
        "Top eigenspaces",
        (
            f"Principal angles between the spaces of the {len(numbers)} eigenvectors of largest |eigenvalue|: 0 "
            "degrees is a direction that both have, 90 one that the other lacks. "
            + " ".join(f"{labels[d.url]} shares {d.overlap:.1%}." for d in others),
        ),
        (picture,),
        Table.of(("angle", *(labels[d.url] for d in others)),
                 ([n, *(f"{d.angles[n - 1]:.2f}" for d in others)] for n in numbers)),
    )  # fmt: skip


def _layers(found: Comparison, labels: Mapping[str, str]) -> Part:
    others, moved = [labels[d.url] for d in found.differences[1:]], found.moved()
    with new_figure(max(4.5, min(3 + 0.4 * len(others), 12)), min(1.8 + 0.22 * len(moved), 14)) as figure:
        values = np.array([row for _, row in moved])
        draw_over_steps(figure.add_subplot(), values, [name for name, _ in moved], others, "relative distance")
        picture = take(figure, "moved", "How far each parameter's own block moved, the furthest at the top.")
    return Part(
        "layers",
        "What moved",
        ("The distance of each parameter's own block from the first one's, in units of it; the furthest at the top.",),
        (picture,),
        Table.of(("parameter", *others), ([name, *row] for name, row in moved)),
    )
