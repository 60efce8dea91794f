"""What a report is of: a Hessian, what one read of it gave, and what its run left behind."""

from dataclasses import dataclass
from functools import partial

from pipeline.analysis.hessian import Hessian
from pipeline.analysis.products import SHARE_HELD
from pipeline.analysis.raster import Raster
from pipeline.planning.memory import available_bytes
from pipeline.storage.read_ahead import ahead
from pipeline.storage.receipts import RECEIPT_READERS, Receipt, own_receipt
from pipeline.storage.run_files import Forecast, read_forecast, read_seconds

WHOLE_UP_TO = 8_192  # rows: all eigenvalues take LAPACK under two minutes on two cores
# Of Lanczos; and of vectors' residuals, in units of |H|. In memory a product costs little, else it reads the store.
STEPS, STREAMED_STEPS = 64, 16
TOLERANCE, STREAMED_TOLERANCE = 1e-6, 1e-3
SHARE_OF_FREE = 0.4  # of memory, for a matrix of which all eigenvalues are found


@dataclass(frozen=True)
class Subject:
    """What the parts draw from.

    Attributes:
        hessian: read once already: its sums are kept.
        raster: its entries, down-sampled; empty where nobody wants them.
        receipts: of its tiles, those that can be read.
        forecast: what was planned.
        seconds: that planning, tiles and verifying took in the last call.
        lost: tiles that the last call had to give out again, by what became of them.
    """

    hessian: Hessian
    raster: Raster
    receipts: list[Receipt]
    forecast: Forecast | None
    seconds: dict[str, float]
    lost: dict[str, int]

    @classmethod
    def of(cls, hessian: Hessian, lost: dict[str, int], *, raster: bool) -> "Subject":
        """Read a Hessian once, and the records of its run.

        Args:
            hessian: a finished one.
            lost: what the driver told of lost tiles.
            raster: whether its entries are to be drawn.

        Returns:
            All of it.

        Raises:
            IncompleteError: a chunk is missing or damaged.
        """
        picture = Raster(hessian.parameters)
        hessian.scan(*([picture.add] if raster else []))
        tiles = hessian.manifest.plan.tiles()
        found = ahead(partial(own_receipt, hessian.output, hessian.manifest), tiles, RECEIPT_READERS)
        receipts = [receipt for receipt in found if receipt is not None]
        output = hessian.output
        return cls(hessian, picture, receipts, read_forecast(output), read_seconds(output), lost)

    @property
    def is_small(self) -> bool:
        """Whether all eigenvalues are found."""
        return may_be_whole(self.hessian.shape[0])

    @property
    def steps(self) -> int:
        """How many steps an estimate of the spectrum takes."""
        return STEPS if self._is_held else STREAMED_STEPS

    @property
    def tolerance(self) -> float:
        """How large the residuals of eigenvectors may be, in units of |H|."""
        return TOLERANCE if self._is_held else STREAMED_TOLERANCE

    @property
    def _is_held(self) -> bool:
        """Whether iterations hold the matrix in memory."""
        return 8 * self.hessian.shape[0] ** 2 <= SHARE_HELD * available_bytes()


def may_be_whole(rows: int) -> bool:
    """Whether all eigenvalues of so many rows are found in a while, in memory."""
    return rows <= WHOLE_UP_TO and 8 * rows**2 <= SHARE_OF_FREE * available_bytes()
