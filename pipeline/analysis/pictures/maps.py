"""Maps of a matrix: the sizes of its blocks, or of its entries, in colours."""

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.analysis.pictures.canvas import MAP, grouped, layer_of, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm

DECADES = 8  # shown below the largest
LEVELS = 96  # of colour: more would cost bytes, and nobody sees them
MOST_LABELS = 48  # on a side

Values = npt.NDArray[np.float64]


def draw_map(axes: "Axes", values: Values, names: Sequence[str], starts: Sequence[int], label: str) -> None:
    """Draw a symmetric matrix of sizes, on a logarithmic scale, with its parameters on both sides.

    Args:
        axes: to draw into.
        values: not negative; NaN, where nothing was computed, stays empty.  # shape: (n, n)
        names: of the parameters.
        starts: where each begins among the n, and n.  # shape: (parameters + 1,)
        label: of the scale of colours.
    """
    from matplotlib import colormaps

    norm, clipped = scale_of(values)
    n = len(values)
    floor = None if norm is None else norm.vmin
    image = axes.imshow(
        values if floor is None else np.maximum(values, floor),  # a NaN stays one
        norm=norm,
        cmap=colormaps[MAP].resampled(LEVELS),
        extent=(0, n, n, 0),
        interpolation="none",
    )
    _name_sides(axes, names, np.asarray(starts))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.figure.colorbar(image, ax=axes, label=label, shrink=0.75, pad=0.02, extend="min" if clipped else "neither")


def scale_of(values: Values) -> tuple["LogNorm | None", bool]:
    """Return the scale of colours, and whether some values lie below it; no scale where all are equal or zero."""
    from matplotlib.colors import LogNorm

    seen = values[np.isfinite(values) & (values > 0)]
    if not len(seen) or seen.min() == seen.max():
        return None, False
    top, low = float(seen.max()), max(float(seen.min()), float(seen.max()) / 10**DECADES)
    return LogNorm(low, top), bool((values < low).any())


def painted(values: Values) -> bytes:
    """Return the colours of `draw_map` alone, a pixel for each value, transparent where nothing was computed: a PNG."""
    require_matplotlib()
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from PIL import Image

    norm: Any = scale_of(values)[0] or Normalize()
    heights = np.clip(np.nan_to_num(np.asarray(norm(np.maximum(values, norm.vmin or 0)))), 0, 1)
    indices = np.where(np.isfinite(values), (heights * (LEVELS - 1)).round(), LEVELS).astype(np.uint8)
    image, data = Image.fromarray(indices, "P"), io.BytesIO()
    colours = np.append(colormaps[MAP].resampled(LEVELS)(range(LEVELS))[:, :3], np.zeros((1, 3)), axis=0)
    image.putpalette((colours * 255).astype(np.uint8).tobytes())
    image.save(data, "PNG", optimize=True, transparency=LEVELS)
    return data.getvalue()


def _name_sides(axes: "Axes", names: Sequence[str], starts: npt.NDArray[np.int64]) -> None:
    """Write the parameters' names, as far as there is room, and draw lines between parameters and between modules."""
    filled = [k for k in range(len(names)) if starts[k + 1] > starts[k]]
    places: list[float] = []
    named: list[str] = []
    for k in filled:
        place = float(starts[k] + starts[k + 1]) / 2
        if not places or place - places[-1] >= starts[-1] / MOST_LABELS:
            places.append(place)
            named.append(names[k])
    labels = grouped(named)
    # A dollar in a name is no formula.
    axes.set_xticks(places, labels, rotation=90, parse_math=False)
    axes.set_yticks(places, labels, parse_math=False)
    if len(filled) > 4 * MOST_LABELS:
        return
    for a, b in pairwise(filled):
        width = 0.35 if layer_of(names[a]) == layer_of(names[b]) else 1.1
        axes.axhline(starts[b], linewidth=width, color="white", alpha=0.75)
        axes.axvline(starts[b], linewidth=width, color="white", alpha=0.75)
