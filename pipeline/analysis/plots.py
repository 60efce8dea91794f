"""A Hessian drawn in a notebook: as a map of blocks, as a spectrum, as a picture, and as what a cell shows of it."""

from typing import TYPE_CHECKING

from pipeline.analysis.pictures.canvas import pyplot_axes
from pipeline.analysis.pictures.maps import draw_map, painted
from pipeline.analysis.pictures.spectra import draw_bins, draw_eigenvalues
from pipeline.analysis.raster import Raster
from pipeline.analysis.solve import Solve
from pipeline.analysis.spectrum_summary import spectrum_of
from pipeline.errors import HessianError, counted, human_bytes
from pipeline.planning.notebook import card

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE_ROWS = 512  # of `imshow`
CHEAP_BYTES = 64 * 2**20  # stored here, of which a cell reads all for a small map


class Plots(Solve):
    """Of a Hessian: pictures. Each gives the Matplotlib axes it is drawn into: those given, or new ones of pyplot."""

    def plot_blocks(self, ax: "Axes | None" = None) -> "Axes":
        """Draw how large the entries of each block are; see `block_sizes` for cost.

        Args:
            ax: to draw into.

        Returns:
            The axes.

        Raises:
            SpecError: matplotlib is not installed.
        """
        axes, names = pyplot_axes(ax), self.parameters.names
        draw_map(axes, self.block_sizes(), names, range(len(names) + 1), "root mean square of the entries")
        return axes

    def plot_spectrum(self, ax: "Axes | None" = None, *, density: bool = False) -> "Axes":
        """Draw the eigenvalues; see `eigvalsh` and `spectral_density` for cost and errors.

        Args:
            ax: to draw into.
            density: how many there are in each decade, estimated at any size, in place of all of them.

        Returns:
            The axes.
        """
        axes = pyplot_axes(ax)
        if not density:
            draw_eigenvalues(axes, self.eigvalsh(), self.inertia().zero)
            return axes
        draw_bins(axes, spectrum_of(self, "density")["bins"])
        return axes

    def imshow(self, ax: "Axes | None" = None, *, rows: int = PICTURE_ROWS) -> "Axes":
        """Draw the absolute values of all entries, down-sampled by their root mean square: one read of the store.

        Args:
            ax: to draw into.
            rows: of the picture, at most.

        Returns:
            The axes.
        """
        axes, picture = pyplot_axes(ax), Raster(self.parameters, rows)
        self.scan(picture.add)
        draw_map(axes, picture.values(), self.parameters.names, picture.starts.tolist(), "|entry|, root mean square")
        return axes

    def _repr_html_(self) -> str:
        samples = counted(self.manifest.fingerprint.samples, "sample")
        values = [
            ("P", f"{self.shape[0]:,}"),
            ("of", f"{counted(len(self.parameters), 'parameter')} over {samples}"),
            ("loss", f"{self.loss:.6g}"),
            ("stored", f"{self.dtype}, {self.manifest.symmetry}, {human_bytes(self.manifest.matrix_bytes)} raw"),
            ("at", self.url),
        ]
        rows = [(p.name, p.shape_text, f"{p.size:,}") for p in self.parameters]
        title = f"Hessian of {self.manifest.problem or 'a loss'}"
        return card(title, values, "parameters", ("name", "shape", "rows"), rows, self._thumbnail())

    def _thumbnail(self) -> bytes | None:
        """Return a small map of the blocks, where that costs little."""
        is_near = self.output.is_local or self.output.is_memory
        if not is_near or self.manifest.matrix_bytes > CHEAP_BYTES:
            return None
        try:
            return painted(self.block_sizes())
        except HessianError:  # a cell shows what there is
            return None
