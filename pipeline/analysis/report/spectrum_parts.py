"""The sections on eigenvalues: all of them, the outermost and their vectors, those of each layer."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.analysis.pictures.canvas import layer_of, new_figure, take
from pipeline.analysis.pictures.spectra import (
    beyond,
    draw_bins,
    draw_eigenvalues,
    draw_homes,
    draw_layers,
    table_of_shares,
)
from pipeline.analysis.report.parts import Part, Table
from pipeline.analysis.report.subject import Subject, may_be_whole
from pipeline.analysis.spectrum_summary import spectrum_of
from pipeline.errors import counted
from pipeline.planning.parameters import ParameterLayout
from pipeline.progress import Reporter

ENDS = 10  # eigenvalues: half of them from each end
NOT_ALL = "The run did not compute all of H."


def spectrum_part(subject: Subject) -> Part:
    """Draw the eigenvalues: all, or an estimate of how they are spread."""
    if not subject.hessian.is_complete:
        return Part("spectrum", "Spectrum", (NOT_ALL,))
    found = spectrum_of(subject.hessian, "whole" if subject.is_small else "density", steps=subject.steps)
    is_whole = "eigenvalues" in found
    with new_figure(10 if is_whole else 6.5, 4.2) as figure:
        if is_whole:
            left, right = figure.subplots(1, 2)
            w, zeros = np.array(found["eigenvalues"]), found["inertia"]["zero"]
            draw_eigenvalues(left, w, zeros)
            draw_bins(right, found["bins"], float(np.sort(np.abs(w))[:zeros].max(initial=0.0)))
        else:
            draw_bins(figure.add_subplot(), found["bins"])
        negative = found["inertia"]["negative"] if is_whole else found["negative"]["count"]
        picture = take(
            figure,
            "spectrum",
            f"Eigenvalues by decade on both sides of zero, about {negative:,.0f} of {found['P']:,} below zero.",
        )
    rows = ((f"{b['from']:.0e}", f"{b['to']:.0e}", b["count"], b["error"]) for b in reversed(found["bins"]))
    table = Table.of(("from", "to", "eigenvalues", "error"), rows)
    return Part("spectrum", "Spectrum", (_in_words(found),), (picture,), table)


def _in_words(found: dict[str, Any]) -> str:
    """Say what the spectrum is like."""
    if "inertia" not in found:
        count, error = found["negative"]["count"], found["negative"]["error"]
        told = f"About {count:,.0f} of {found['P']:,} eigenvalues are below zero, give or take {error:,.0f}"
        if error > found["P"] / 4:
            told = "How many are below zero it cannot tell: most are too near to it"
        return (
            "Too large to find all eigenvalues: an estimate by stochastic Lanczos quadrature, with standard errors. "
            f"{told}; the decades about zero that it does not tell apart are one bin."
        )
    signs, condition = found["inertia"], found["condition_number"]
    w = found["eigenvalues"]
    return (
        f"All {found['P']:,} eigenvalues (LAPACK, float64), from {w[0]:.4g} to {w[-1]:.4g}: "
        f"{signs['positive']:,} positive, {signs['negative']:,} negative, {signs['zero']:,} zero within rounding of "
        f"the stored type. Rank {found['rank']:,}; condition number "
        f"{'infinite' if condition is None else f'{condition:.3g}'}."
    )


def ends_part(subject: Subject) -> Part:
    """Draw the outermost eigenvalues, and in which layers their vectors live."""
    H = subject.hessian
    if not H.is_complete:
        return Part("ends", "Top and bottom", (NOT_ALL,))
    w, U = H.eigsh(min(ENDS, H.shape[0]), "BE", tol=subject.tolerance)
    w, U = w[::-1], U[:, ::-1]
    layers, shares = shares_by_layer(H.parameters, U)
    with new_figure(max(5.0, min(3.0 + 0.3 * len(layers), 12.0)), 4.2) as figure:
        draw_homes(figure.add_subplot(), w.tolist(), layers, shares)
        picture = take(
            figure, "ends", "Map of the outermost eigenvectors by layer: the share of each vector's square in it."
        )
    homes = table_of_shares(shares, layers)
    home = layers[int(shares[0].argmax())]
    return Part(
        "ends",
        "Top and bottom",
        (
            f"The {len(w)} outermost eigenvalues, right to {subject.tolerance:.0e} of the largest or better. The "
            f"vector of the largest, {w[0]:.4g}, has {shares[0].max():.0%} of its square in layer {home}.",
        ),
        (picture,),
        Table.of(("eigenvalue", "lives in"), [[float(x), *row] for x, row in zip(w, homes, strict=True)]),
    )


def shares_by_layer(
    layout: ParameterLayout, vectors: npt.NDArray[np.float64]
) -> tuple[list[str], npt.NDArray[np.float64]]:
    """Return the modules, and of each vector the share of its square in each of them.

    Args:
        layout: the parameters.
        vectors: # shape: (P, k)

    Returns:
        Names, and shares.  # shape: (k, modules)
    """
    modules = [layer_of(p.name) or "(no module)" for p in layout]
    layers = list(dict.fromkeys(modules))
    shares = np.zeros((vectors.shape[1], len(layers)))
    for p, module in zip(layout, modules, strict=True):
        shares[:, layers.index(module)] += np.square(vectors[p.place]).sum(0)
    return layers, shares / shares.sum(1, keepdims=True)


def layers_part(subject: Subject) -> Part:
    """Draw the eigenvalues of each parameter's own block."""
    H = subject.hessian
    if not H.has_diagonal:
        return Part("layers", "Layer by layer", ("The run did not compute all blocks on the diagonal.",))
    spectra: dict[str, npt.NDArray[np.float64]] = {}
    counts: dict[str, tuple[int, int, int]] = {}
    for view in H.block_diagonal():
        (name,) = view.parameters.names
        if not view.shape[0]:
            continue
        if may_be_whole(view.shape[0]):
            view.report = Reporter()  # they are many and small
            signs = view.inertia()
            spectra[name] = np.sort(beyond(view.eigvalsh(), signs.zero))
            counts[name] = signs.positive, signs.zero, signs.negative
        else:
            spectra[name] = view.eigsh(ENDS, "BE", return_eigenvectors=False, tol=subject.tolerance)
    text = (
        "The eigenvalues of each parameter's own block, as if all others were fixed; those that are zero "
        "within rounding are not drawn."
    )
    if large := [name for name in spectra if name not in counts]:
        text += f" The {ENDS} outermost alone, as the block is large: {', '.join(large)}."
    if not spectra:
        return Part("layers", "Layer by layer", (text,))
    with new_figure(max(5.0, min(2.0 + 0.3 * len(spectra), 14.0)), 4.6) as figure:
        draw_layers(figure.add_subplot(), spectra)
        picture = take(
            figure, "layers", f"Eigenvalues of the blocks of {counted(len(spectra), 'parameter')}, by sign and size."
        )
    return Part(
        "layers",
        "Layer by layer",
        (text,),
        (picture,),
        Table.of(
            ("parameter", "rows", "least", "largest", "positive", "zero", "negative"),
            (
                (
                    name,
                    H.parameters[name].size,
                    float(w.min(initial=0)),
                    float(w.max(initial=0)),
                    *counts.get(name, ["not counted"] * 3),
                )
                for name, w in spectra.items()
            ),
        ),
    )
