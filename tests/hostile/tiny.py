"""The smallest problem that has chunks and tiles."""

import torch
from torch import nn

from pipeline import Problem
from pipeline.runs.sweep_table import Row, Sweep, moment
from pipeline.storage.output import Output


def tiny():
    """Ten parameters, so that nothing takes long but what should not."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, dtype=torch.float64)
    return Problem(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double(), nn.MSELoss(), (x, x[:, :1]))


def sweep(folder, job):
    """Put the table of a sweep over two checkpoints there."""
    table = Sweep(job, seen={"a.pt": ("size 3", "a" * 64)})
    for name in "ab":
        blocks = [{"row": "0.weight", "col": "0.weight", "norm": 1.0}]
        table.rows[64 * name] = Row(f"{name}.pt", 64 * name, None, 9, 4, 0.5, 1.0, 1.0, None, blocks, moment(1e9), 1.5)
    table.write(Output(str(folder)))
