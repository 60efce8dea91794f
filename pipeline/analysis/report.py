"""A picture of a finished Hessian: how large the entries of each block are, as a map."""

import io
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.analysis.hessian import Hessian, open_hessian
from pipeline.errors import SpecError, printable
from pipeline.storage.output import BLOCK_NORMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES_PER_PARAMETER = 0.45
MARGIN_INCHES = 2.5  # names of parameters, title, scale
MOST_INCHES = 20.0
DOTS_PER_INCH = 120


def write_report(url: str, endpoint_url: str | None = None) -> str:
    """Draw the blocks of a finished Hessian and put the picture into its output.

    Args:
        url: of the Hessian.
        endpoint_url: of its server, where it is not the cloud's own.

    Returns:
        The URL of the picture, a PNG file.

    Raises:
        SpecError: matplotlib is not installed.
        IncompleteError: the Hessian is not finished, or damaged.
        OutputError: it cannot be read or written.
    """
    _require_matplotlib()
    hessian = open_hessian(url, endpoint_url)
    picture = io.BytesIO()
    _figure(hessian).savefig(picture, format="png", dpi=DOTS_PER_INCH)
    hessian.output.put(BLOCK_NORMS, picture.getvalue())
    return f"{hessian.url}/{BLOCK_NORMS}"


def entry_sizes(hessian: Hessian) -> npt.NDArray[np.float64]:
    """Return the root mean square of the entries of each block.

    Args:
        hessian: a finished one.

    Returns:
        By row and column parameter; NaN where a block was not computed.  # shape: (parameters, parameters)
    """
    parameters, norms = tuple(hessian.parameters), hessian.block_norms()
    sizes = np.full((len(parameters), len(parameters)), np.nan)
    for i, a in enumerate(parameters):
        for j, b in enumerate(parameters):
            norm = norms.get((a.name, b.name))
            if norm is not None and a.size and b.size:
                sizes[i, j] = norm / np.sqrt(a.size * b.size)
    return sizes


def _require_matplotlib() -> None:
    """Refuse before anything is read."""
    try:
        import matplotlib.colors  # noqa: F401
    except ImportError:
        raise SpecError("matplotlib is not installed: python3 -m pip install matplotlib") from None


def _figure(hessian: Hessian) -> "Figure":
    """Draw the map."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    sizes, names = entry_sizes(hessian), [printable(p.name) for p in hessian.parameters]
    shapes = [" x ".join(map(str, p.shape)) for p in hessian.parameters]
    of = printable(hessian.manifest.problem or "Hessian")
    seen = sizes[np.isfinite(sizes) & (sizes > 0)]
    inches = min(MARGIN_INCHES + INCHES_PER_PARAMETER * len(names), MOST_INCHES)
    figure = Figure(figsize=(inches + 1, inches), layout="constrained")
    axes = figure.add_subplot()
    scale = LogNorm(seen.min(), seen.max()) if len(seen) and seen.min() < seen.max() else None
    image = axes.imshow(np.where(sizes > 0, sizes, np.nan), norm=scale, cmap="viridis")
    # A dollar in a name is no formula.
    axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
    axes.set_yticks(
        range(len(names)), [f"{name}  {shape}" for name, shape in zip(names, shapes, strict=True)], parse_math=False
    )
    axes.set_title(f"{of}: P = {hessian.shape[0]:,}, L = {hessian.loss:.4g}", parse_math=False)
    figure.colorbar(image, label="root mean square of the entries")
    return figure
