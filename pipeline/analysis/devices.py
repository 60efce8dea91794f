"""Where to compute: on a GPU by torch where there is one, else by NumPy and SciPy, which need no torch."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

DRIVER = Path("/dev/nvidiactl")
SHARE_OF_DEVICE = 0.8  # of its free memory


def chosen(asked: str | None, needed_bytes: int) -> str | None:
    """Choose a device for what needs memory there.

    Args:
        asked: torch's name of one, which is taken, as `"cuda"` or `"cpu"`; None leaves the choice.
        needed_bytes: on the device.

    Returns:
        The device; None: NumPy and SciPy are to do it, on the CPU.
    """
    if asked is not None:
        return asked
    free = _free_bytes()
    return "cuda" if free and needed_bytes <= SHARE_OF_DEVICE * free else None


def placed(values: npt.NDArray[Any], kind: np.dtype[Any], device: str) -> "torch.Tensor":
    """Copy an array to a device of torch, in a type."""
    import torch

    return torch.tensor(np.asarray(values, kind), device=device)


def _free_bytes() -> int:
    """Return what is free on the GPU, 0 where there is none; torch is not imported to find none."""
    if "torch" not in sys.modules and not DRIVER.exists():
        return 0
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0
