"""Batches: any form of data read into memory, checked, and cut into micro-batches.

A batch is a pair (inputs, target), or whatever an `objective` takes; dimension 0 of every tensor in it is the sample.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr as path_of
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, default_collate

from pipeline.errors import ProblemError

Batch = Any  # a pytree of tensors, see above


def read_batches(data: Any) -> tuple[Batch, ...]:
    """Read data into memory.

    Args:
        data: a tuple (one batch of tensors), a `Dataset`, a `DataLoader` of fixed order, or a re-iterable of batches.

    Returns:
        The batches.

    Raises:
        ProblemError: there is no data, its order is not fixed, samples are dropped, two passes differ, or a batch is
            not made of tensors that agree in dimension 0 and hold no NaN.
    """
    if isinstance(data, tuple):
        batches: tuple[Batch, ...] = (_tensors(data),)
    else:
        batches = _one_pass(data)
        if digest(batches) != digest(_one_pass(data)):
            raise ProblemError(
                "data: two passes gave different batches, and a Hessian is a sum over passes of the same data: "
                "switch off shuffling and random augmentation, or pass tensors"
            )
    if not batches:
        raise ProblemError("data: got no batches, expected at least one")
    for index, batch in enumerate(batches):
        _check(batch, f"data: batch {index}")
    return batches


def dense(tensor: Tensor) -> Tensor:
    """Give a tensor in strided layout; sparse embeddings have sparse gradients."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def sample_count(batch: Batch) -> int:
    """Count the samples of a batch."""
    return len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))


def take(batch: Batch, samples: slice | Tensor) -> Batch:
    """Give the batch of some samples of a batch."""
    return tree_map(lambda leaf: leaf[samples] if isinstance(leaf, Tensor) else leaf, batch)


def microbatches(batches: tuple[Batch, ...], most: int | None) -> Iterator[Batch]:
    """Cut batches into pieces of at most so many samples; None leaves them whole."""
    for batch in batches:
        count = sample_count(batch)
        if most is None or count <= most:
            yield batch
        else:
            yield from (take(batch, slice(start, start + most)) for start in range(0, count, most))


def byte_count(batches: tuple[Batch, ...]) -> int:
    """Count the bytes of all tensors."""
    return sum(leaf.nbytes for leaf in tree_leaves(batches) if isinstance(leaf, Tensor))


def digest(tree: Any) -> str:
    """Hash a pytree: structure, types, shapes and bytes of all tensors."""
    sha = hashlib.sha256()
    for path, leaf in tree_flatten_with_path(tree)[0]:
        sha.update(path_of(path).encode())
        if isinstance(leaf, Tensor):
            value = dense(leaf.detach()).cpu().contiguous()
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(repr(leaf).encode())
    return sha.hexdigest()


def _one_pass(data: Any) -> tuple[Batch, ...]:
    """Read all batches once."""
    if isinstance(data, DataLoader):
        _check_loader(data)
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        samples = [data[i] for i in range(len(data))]  # type: ignore[arg-type]
        return (_tensors(default_collate(samples)),) if samples else ()
    elif isinstance(data, Tensor | Mapping) or not hasattr(data, "__iter__"):
        raise ProblemError(
            f"data: got {type(data).__name__}, expected a tuple (inputs, target), a Dataset, a DataLoader "
            "or a re-iterable of such tuples"
        )
    elif iter(data) is data:
        raise ProblemError(
            f"data: got {type(data).__name__}, which can be read only once: pass a list of its batches instead"
        )
    return tuple(_tensors(batch) for batch in data)


def _check_loader(loader: DataLoader[Any]) -> None:
    """Refuse loaders that do not give all samples in one order."""
    if isinstance(loader.sampler, RandomSampler):
        raise ProblemError("data: the DataLoader shuffles: pass shuffle=False")
    if loader.drop_last or getattr(loader.batch_sampler, "drop_last", False):
        raise ProblemError("data: the DataLoader drops its last batch, whose samples count as well: drop_last=False")


def _tensors(value: Any) -> Batch:
    """Turn NumPy arrays into tensors, and lists (as collated) into tuples."""
    if type(value) in {list, tuple}:
        return tuple(map(_tensors, value))
    if isinstance(value, Mapping):  # tokenizers give mappings of their own
        return {key: _tensors(item) for key, item in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _check(batch: Batch, where: str) -> None:
    """Refuse a batch without samples, of ragged leaves, or with NaN."""
    counts: dict[str, int] = {}
    for path, leaf in tree_flatten_with_path(batch)[0]:
        if leaf is None:
            continue
        name = f"{where}, leaf {path_of(path)}"
        if not isinstance(leaf, Tensor):
            raise ProblemError(f"{name}: got {type(leaf).__name__}, expected a tensor")
        if leaf.ndim == 0:
            raise ProblemError(f"{name}: got a 0-d tensor, expected dimension 0 to be the sample")
        if leaf.is_floating_point() and bool(leaf.isnan().any()):
            raise ProblemError(f"{name}: {int(leaf.isnan().sum())} of {leaf.numel()} values are NaN")
        counts[name] = len(leaf)
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ProblemError(
            f"{where}: expected at least one sample, and as many in every tensor; got "
            + (", ".join(f"{n} in {name.rpartition(' ')[2]}" for name, n in counts.items()) or "no tensor")
        )
