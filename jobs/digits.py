"""Networks trained in seconds on scikit-learn's 1,797 handwritten digits (8 x 8 pixels, ten classes)."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pipeline import Problem


def mlp(hidden: int = 32, steps: int = 100, seed: int = 0) -> Problem:
    """A tanh network 64-hidden-hidden-10: 3,466 parameters at the default width."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    images, labels = digits()
    return trained(model, images, labels, steps)


def cnn(steps: int = 100, seed: int = 0) -> Problem:
    """Two convolutions and a linear head: 1,898 parameters."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    images, labels = digits()
    return trained(model, images, labels, steps)


def digits() -> tuple[Tensor, Tensor]:
    """All images, scaled to [0, 1], and their labels."""
    data = load_digits()
    return torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)


def trained(model: nn.Module, inputs: Tensor, target: Tensor, steps: int) -> Problem:
    """Train on all samples by Adam, and give the problem at the result."""
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(inputs), target).backward()
        optimizer.step()
    return Problem(model.eval(), loss, (inputs, target))
