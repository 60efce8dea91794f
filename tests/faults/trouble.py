"""A problem whose loss does harm when told to, in the process that computes it: by a file in a folder, once for each.

A worker takes one order at most: the next is for the one that follows it, not for the call that waited here.
"""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from pipeline import Problem


class Orders:
    """A folder of orders, shared by all processes; each is carried out by the first that finds it."""

    def __init__(self, folder):
        self.folder, self.taken = Path(folder), None
        self.gate = self.folder.with_name(f"{self.folder.name}.gate")  # while it is there, nothing is computed

    def give(self, *orders):
        for k, order in enumerate(orders):
            (self.folder / f"{order}.{time.monotonic_ns()}.{k}").touch()

    def left(self):
        return len(list(self.folder.iterdir()))

    def take(self, *wanted):
        """Give the oldest order of those wanted, to one process; None where there is none."""
        if self.taken == os.getpid():
            return None
        for path in sorted(self.folder.iterdir()):
            order = path.name.split(".")[0]
            if order not in wanted:
                continue
            try:
                path.unlink()
            except FileNotFoundError:  # another was faster
                continue
            self.taken = os.getpid()
            return order
        return None


class Loss(nn.Module):
    """The mean squared error, as long as there are no orders."""

    def __init__(self, orders):
        super().__init__()
        self.orders = orders

    def forward(self, output, target):
        loss = nn.functional.mse_loss(output, target)
        match self.orders.take("dawdle", "die", "fail", "hang", "nan", "run out of memory", "take memory"):
            case "dawdle":
                time.sleep(4)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fail":
                raise RuntimeError("ordered to fail")
            case "hang":
                time.sleep(3600)
            case "nan":
                return loss * torch.nan
            case "run out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory, as ordered")
            case "take memory":
                self.held = torch.ones(2**30, dtype=torch.uint8), torch.ones(2**30, dtype=torch.uint8)
                time.sleep(3600)
        return loss


class Model(nn.Sequential):
    """A small net that takes its time, and that may fail to be unpickled."""

    def __init__(self, orders, pause=0.0, hidden=9):
        super().__init__(nn.Linear(7, hidden), nn.Tanh(), nn.Linear(hidden, 6))
        self.orders, self.pause = orders, pause

    def forward(self, x):
        while self.orders.gate.exists():
            time.sleep(0.02)
        if self.pause:
            time.sleep(self.pause)
        return super().forward(x)

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.orders.take("fail to start"):
            raise RuntimeError("ordered not to start")


def problem(folder, pause=0.0, hidden=9):
    """P = 14 hidden + 6; the folder holds the orders."""
    Path(folder).mkdir(exist_ok=True)
    torch.manual_seed(0)
    orders = Orders(folder)
    x, y = torch.randn(8, 7), torch.randn(8, 6)
    return Problem(Model(orders, pause, hidden), Loss(orders), (x, y)), orders


def slow(orders, pause, hidden=9):
    """The same, for job specs."""
    return problem(orders, pause, hidden)[0]
