"""A Hessian as an array of other libraries: dask's, which computes on parts of it, and xarray's, which names them."""

from typing import TYPE_CHECKING

import numpy as np

from pipeline.analysis.array import ArrayView
from pipeline.errors import SpecError

if TYPE_CHECKING:
    import dask.array
    import xarray

REMEDY = "is not installed: python3 -m pip install 'dask[array]' xarray"


class Bridges(ArrayView):
    """Of a Hessian: the same for other libraries."""

    def to_dask(self) -> "dask.array.Array":
        """Return a dask array of all of H, in the chunks it is stored in; each is read when it is computed.

        Returns:
            A lazy array; of an upper triangle, too.  # shape: (P, P)

        Raises:
            SpecError: dask is not installed.
        """
        try:
            import dask.array
        except ImportError:
            raise SpecError(f"dask {REMEDY}") from None
        sides = tuple(band.place.stop - band.place.start for band in self._bands)
        name = f"hessian-{self.manifest.digest}-{'-'.join(self.parameters.names)}"
        meta = np.empty((0, 0), self.dtype)
        lazy: dask.array.Array = dask.array.from_array(self, (sides, sides), name=name, asarray=True, meta=meta)
        return lazy

    def to_xarray(self) -> "xarray.DataArray":
        """Return a DataArray of all of H, lazy as `to_dask` is, with the names of parameters on both axes.

        `a.sel(row_parameter="0.weight")` takes rows, once `set_xindex("row_parameter")` was called.

        Returns:
            Dimensions `row` and `col`; coordinates `row_parameter` and `col_parameter`; loss and URL as attributes.

        Raises:
            SpecError: xarray or dask is not installed.
        """
        try:
            import xarray
        except ImportError:
            raise SpecError(f"xarray {REMEDY}") from None
        names = np.repeat(self.parameters.names, [p.size for p in self.parameters])
        numbers = np.arange(self.shape[0])
        coordinates = {
            "row": numbers,
            "col": numbers,
            "row_parameter": ("row", names),
            "col_parameter": ("col", names),
        }
        about = {"loss": self.loss, "url": self.url}
        return xarray.DataArray(self.to_dask(), coordinates, ("row", "col"), name="hessian", attrs=about)
