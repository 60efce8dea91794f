"""Numbers of many Hessians over the steps of a training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.analysis.pictures.canvas import MAP, POSITIVE, short
from pipeline.analysis.pictures.maps import scale_of
from pipeline.analysis.pictures.spectra import INKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_series(axes: "Axes", steps: Sequence[float], series: Mapping[str, Sequence[float]], label: str) -> None:
    """Draw numbers over steps, a line for each name; NaN where there is none."""
    for k, (name, values) in enumerate(series.items()):
        ink = INKS[k % len(INKS)] if len(series) > 1 else POSITIVE
        axes.plot(
            steps, values, "o-" if k < len(INKS) else "s--", color=ink, markersize=3, linewidth=1.2, label=short(name)
        )
    axes.set(ylabel=label)
    if len(series) > 1:
        for text in axes.legend(fontsize=7).get_texts():
            text.set_parse_math(False)


def draw_over_steps(
    axes: "Axes", values: npt.NDArray[np.float64], rows: Sequence[str], steps: Sequence[str], label: str
) -> None:
    """Draw sizes in colours, on a logarithmic scale: a row for each name, a column for each step."""
    image = axes.imshow(values, norm=scale_of(values)[0], cmap=MAP, aspect="auto", interpolation="none")
    axes.set_yticks(range(len(rows)), [short(row) for row in rows], parse_math=False)
    every = -(-len(steps) // 24)
    axes.set_xticks(range(0, len(steps), every), [short(s) for s in steps[::every]], rotation=90, parse_math=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.figure.colorbar(image, ax=axes, label=label, pad=0.02)
