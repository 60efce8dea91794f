"""What all pictures share: the figure, its inks for light and dark, and how it is written."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import SpecError, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito, Color Universal Design: told apart by colour-blind people, and seen on white and on black.
POSITIVE, NEGATIVE, THIRD, NEITHER = "#1f83c6", "#d55e00", "#009e73", "#808080"
MAP = "viridis"
DOTS_PER_INCH = 150
LONGEST_NAME = 30  # characters of a label

_INK, _INK_IN_THE_DARK = "#1b1b1e", "#e6e6ea"
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "legend.frameon": False,
    "svg.hashsalt": "hessian",  # the same picture gives the same file
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_SVG_STYLE = (
    f"<style>svg{{color:{_INK}}}"
    f"@media screen and (prefers-color-scheme:dark){{svg{{color:{_INK_IN_THE_DARK}}}}}</style>"
)


@dataclass(frozen=True)
class Picture:
    """A figure as files.

    Attributes:
        name: of the files, without an ending.
        alt: what it shows, for who cannot see it.
        svg: follows the reader's choice of light or dark; text is outlines.
        png: dark on white.
    """

    name: str
    alt: str
    svg: bytes
    png: bytes


def require_matplotlib() -> None:
    """Refuse before anything is read.

    Raises:
        SpecError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise SpecError("matplotlib is not installed: python3 -m pip install matplotlib jinja2") from None


@contextmanager
def new_figure(width: float, height: float) -> Iterator["Figure"]:
    """Return a figure of our style, which belongs to nobody else: pyplot does not know of it.

    Args:
        width: inches.
        height: inches.

    Yields:
        The figure; written inside the context, by `take`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name may have letters that the font lacks, and is in the table below the picture.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield Figure(figsize=(width, height), layout="constrained")


def take(figure: "Figure", name: str, alt: str) -> Picture:
    """Write a figure.

    Args:
        figure: of `new_figure`.
        name: of its files.
        alt: what it shows.

    Returns:
        It.
    """
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    figure.savefig(svg, format="svg", dpi=DOTS_PER_INCH, metadata={"Date": None, "Creator": None})
    return Picture(name, alt, _following_the_reader(svg.getvalue()), png.getvalue())


def pyplot_axes(axes: "Axes | None") -> "Axes":
    """Return axes to draw into: those given, else new ones of pyplot, which a notebook shows."""
    require_matplotlib()
    if axes is not None:
        return axes
    from matplotlib import pyplot

    return pyplot.figure(layout="constrained").add_subplot()


def short(name: str) -> str:
    """Cut a name in the middle, and write escapes for what cannot be printed."""
    text = printable(name)
    kept = (LONGEST_NAME - 1) // 2
    return text if len(text) <= LONGEST_NAME else f"{text[:kept]}…{text[-kept:]}"


def layer_of(name: str) -> str:
    """Return the module that a parameter is of."""
    return name.rpartition(".")[0]


def grouped(names: Sequence[str]) -> list[str]:
    """Return labels for parameters in order: the whole name for the first of a module, for others what follows it."""
    before = [None, *map(layer_of, names)]
    return [
        short(name) if not (layer := layer_of(name)) or layer != last else f"· {short(name[len(layer) + 1 :])}"
        for name, last in zip(names, before, strict=False)
    ]


def _following_the_reader(svg: bytes) -> bytes:
    """Let ink be the reader's; comments, which repeat the text of names, go."""
    text = re.sub(r"<!--.*?-->", "", svg.decode(), flags=re.DOTALL).replace(_INK, "currentColor")
    opening = text.index(">", text.index("<svg")) + 1
    return (text[:opening] + _SVG_STYLE + text[opening:]).encode()
