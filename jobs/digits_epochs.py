"""Train a small network on digits and keep its weights after every epoch: what `schedules/digits_epochs.yaml` sweeps.

python3 jobs/digits_epochs.py output/digits_epochs/checkpoints
"""

import sys
from pathlib import Path

import torch
from digits import digits, mlp
from safetensors.torch import save_file
from torch import nn

BATCH = 64


def train(folder: Path, epochs: int = 10, hidden: int = 8) -> None:
    """Write `epoch0.safetensors`, the beginning, to `epoch10.safetensors`."""
    model, loss = mlp(hidden=hidden, steps=0).model, nn.CrossEntropyLoss()
    images, labels = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in range(epochs + 1):
        save_file(model.state_dict(), folder / f"epoch{epoch}.safetensors")
        for batch in torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).split(BATCH):
            optimizer.zero_grad()
            loss(model(images[batch]), labels[batch]).backward()
            optimizer.step()


if __name__ == "__main__":
    train(Path(sys.argv[1]))
