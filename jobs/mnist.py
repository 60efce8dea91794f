"""A network trained in seconds on 10,000 handwritten digits of the MNIST set (28 x 28 pixels, ten classes)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import Problem

DATA = Path(__file__).parent / "data" / "mnist10k.npz"
MINIBATCH = 200


def mlp(hidden: int = 128, steps: int = 400, seed: int = 0, samples: int | None = None) -> Problem:
    """A tanh network 784-hidden-10: 101,770 parameters at the default width."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    images, labels = digits(samples)
    return trained(model, images, labels, steps)


def digits(samples: int | None = None) -> tuple[Tensor, Tensor]:
    """The images, one a row and scaled to [0, 1], and their labels: all, or the first so many."""
    with np.load(DATA) as data:
        images, labels = data["images"][:samples], data["labels"][:samples]
    return torch.from_numpy(images).flatten(1).float() / 255, torch.from_numpy(labels).long()


def trained(model: nn.Module, inputs: Tensor, target: Tensor, steps: int) -> Problem:
    """Train by Adam on minibatches, drawn by torch's generator, and give the problem of all samples at the result."""
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        some = torch.randint(len(inputs), (MINIBATCH,))
        optimizer.zero_grad()
        loss(model(inputs[some]), target[some]).backward()
        optimizer.step()
    return Problem(model.eval(), loss, (inputs, target))
