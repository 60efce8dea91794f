"""Spectra: eigenvalues by rank, by decade, by layer, and where the vectors of the outermost ones live."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.analysis.pictures.canvas import MAP, NEGATIVE, NEITHER, POSITIVE, THIRD, grouped, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Vector = npt.NDArray[np.float64]
INKS = (POSITIVE, NEGATIVE, THIRD, "#cc79a7", "#e69f00", "#56b4e9")
DECADES = 12  # shown below the largest
MOST_POINTS = 500  # drawn as outlines


def draw_eigenvalues(axes: "Axes", w: Vector, zeros: int) -> None:
    """Draw absolute values on a logarithmic scale, by rank among those of the same sign.

    Args:
        axes: to draw into.
        w: all eigenvalues, in any order.  # shape: (P,)
        zeros: how many of them are zero within rounding, and are not drawn.
    """
    told = beyond(w, zeros)
    for sign, ink, mark, label in ((1, POSITIVE, "o", "positive"), (-1, NEGATIVE, "x", "negative")):
        sizes = np.sort(told[np.sign(told) == sign] * sign)[::-1]
        axes.plot(
            np.arange(1, len(sizes) + 1),
            sizes,
            mark,
            color=ink,
            markersize=3,
            markeredgewidth=0.8,
            label=f"{len(sizes):,} {label}",
            rasterized=len(sizes) > MOST_POINTS,
        )
    axes.plot([], [], " ", label=f"{zeros:,} zero within rounding")
    _logarithmic(axes, np.abs(told))
    axes.set(xlabel="rank among those of its sign", ylabel="|eigenvalue|")
    axes.legend(loc="upper right")


def beyond(w: Vector, zeros: int) -> Vector:
    """Return the eigenvalues that are not zero within rounding, of which there are so many."""
    return w[np.argsort(np.abs(w), kind="stable")[zeros:]]


def draw_over_each_other(axes: "Axes", spectra: Mapping[str, Vector]) -> None:
    """Draw several spectra, each descending, as lines; each as far as it is positive."""
    for k, (label, w) in enumerate(spectra.items()):
        ordered = np.sort(np.abs(w))[::-1]
        style = ("-", "--", "-.", ":")[k // len(INKS) % 4]
        axes.plot(
            np.arange(1, len(w) + 1), ordered, style, color=INKS[k % len(INKS)], linewidth=1.2, label=short(label)
        )
    _logarithmic(axes, np.concatenate([np.abs(w) for w in spectra.values()]))
    axes.set(xlabel="rank by absolute value", ylabel="|eigenvalue|")
    for text in axes.legend(loc="upper right").get_texts():
        text.set_parse_math(False)


def draw_bins(axes: "Axes", bins: Sequence[Mapping[str, float]], rounding: float = 0.0) -> None:
    """Draw how many eigenvalues there are in each decade on both sides of zero.

    Args:
        axes: to draw into.
        bins: ascending, as `spectrum_of` gives them: `from`, `to`, `count` and its `error`.
        rounding: bins no further from zero are grey.
    """
    counts = np.array([b["count"] for b in bins])
    errors = np.array([b["error"] for b in bins])
    inks = [
        NEITHER
        if b["from"] < 0 < b["to"] or max(-b["from"], b["to"]) <= rounding
        else NEGATIVE
        if b["to"] <= 0
        else POSITIVE
        for b in bins
    ]
    hatches = ["////" if b["to"] <= 0 else "" for b in bins]  # colour is not all that tells them apart
    places = np.arange(len(bins))
    shown_errors = np.minimum(errors, counts * 0.95)  # a bar on a logarithmic scale has no zero to reach
    axes.bar(
        places,
        counts,
        color=inks,
        hatch=hatches,
        edgecolor="white",
        linewidth=0,
        yerr=np.stack([shown_errors, errors]) if errors.any() else None,
        ecolor=NEITHER,
    )
    axes.set_yscale("log")
    axes.set_ylim(0.5, max(1.0, float((counts + errors).max(initial=1.0))) * 2)
    axes.set_xticks(places, [f"{_power(b['from'])} to {_power(b['to'])}" for b in bins], rotation=60, ha="right")
    axes.set(ylabel="eigenvalues")


def draw_layers(axes: "Axes", spectra: Mapping[str, Vector]) -> None:
    """Draw the eigenvalues of each parameter's own block, a column for each."""
    for k, w in enumerate(spectra.values()):
        for chosen, ink, mark, off in ((w > 0, POSITIVE, "_", -0.18), (w < 0, NEGATIVE, "x", 0.18)):
            here = np.abs(w[chosen])
            axes.plot(
                np.full(len(here), k + off),
                here,
                mark,
                color=ink,
                markersize=7 if mark == "_" else 3,
                markeredgewidth=0.8,
                alpha=0.8,
                rasterized=True,
            )
    _label_columns(axes, spectra, "_", "|eigenvalue|")


def draw_homes(axes: "Axes", eigenvalues: Sequence[float], layers: Sequence[str], shares: Vector) -> None:
    """Draw where eigenvectors live: of each, the share of its squared length in each layer.

    Args:
        axes: to draw into.
        eigenvalues: from top to bottom.
        layers: their names.
        shares: each row sums up to one.  # shape: (eigenvalues, layers)
    """
    image = axes.imshow(shares, cmap=MAP, vmin=0, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(eigenvalues)), [f"{w:.3g}" for w in eigenvalues])
    axes.set_xticks(range(len(layers)), [short(layer) for layer in layers], rotation=90, parse_math=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(ylabel="eigenvalue")
    axes.figure.colorbar(image, ax=axes, label="share of the vector", pad=0.02)


def draw_diagonals(axes: "Axes", diagonals: Mapping[str, Vector]) -> None:
    """Draw the second derivatives along each parameter: their middle, and where nine tenths of them lie."""
    for k, d in enumerate(diagonals.values()):
        for chosen, ink, mark, off in ((d > 0, POSITIVE, "o", -0.14), (d < 0, NEGATIVE, "x", 0.14)):
            if chosen.any():
                low, middle, high = np.quantile(np.abs(d[chosen]), [0.05, 0.5, 0.95])
                axes.plot([k + off, k + off], [low, high], color=ink, linewidth=3, alpha=0.45, solid_capstyle="butt")
                axes.plot([k + off], [middle], mark, color=ink, markersize=4)
    _label_columns(axes, diagonals, "o", "|second derivative|")


def _label_columns(axes: "Axes", columns: Mapping[str, Vector], positive: str, label: str) -> None:
    """Finish a drawing of numbers of both signs with a column for each parameter.

    Args:
        axes: drawn into.
        columns: the numbers, by parameter.
        positive: mark of those above zero; those below have a cross.
        label: of the axis.
    """
    for ink, mark, sign in ((POSITIVE, positive, "positive"), (NEGATIVE, "x", "negative")):
        axes.plot([], [], mark, color=ink, label=sign)
    _logarithmic(axes, np.concatenate([np.abs(values) for values in columns.values()] or [np.zeros(0)]))
    axes.set_xticks(range(len(columns)), grouped(list(columns)), rotation=90, parse_math=False)
    axes.set(ylabel=label, xlim=(-0.6, len(columns) - 0.4))
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.12), ncols=2)


def _logarithmic(axes: "Axes", sizes: Vector) -> None:
    """Set a logarithmic scale that ends where only rounding is left."""
    top = float(sizes.max(initial=0.0))
    if top > 0:
        low = max(float(sizes[sizes > 0].min()), top / 10.0**DECADES)
        axes.set_yscale("log")
        axes.set_ylim(low / 2, top * 2)


def _power(x: float) -> str:
    """Write a power of ten."""
    return f"{'-' if x < 0 else ''}10$^{{{round(np.log10(abs(x)))}}}$" if x else "0"


def table_of_shares(shares: Vector, layers: Sequence[str], most: int = 3) -> list[list[Any]]:
    """Return for each row the layers with the largest shares, in words."""
    best = np.argsort(-shares, axis=1, kind="stable")[:, :most]
    return [
        [", ".join(f"{layers[k]} {row[k]:.0%}" for k in chosen if row[k] >= 0.005)]
        for row, chosen in zip(shares, best, strict=True)
    ]
