"""The smallest problem that has chunks and tiles."""

import torch
from torch import nn

from pipeline import Problem


def tiny():
    """Ten parameters, so that nothing takes long but what should not."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, dtype=torch.float64)
    return Problem(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double(), nn.MSELoss(), (x, x[:, :1]))
