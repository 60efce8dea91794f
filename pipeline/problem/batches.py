"""Batches: pytrees of tensors, cut into micro-batches, cast and hashed. `reading` makes them.

A batch is a pair (inputs, target), or whatever an `objective` takes; dimension 0 of every tensor in it is the sample,
unless the batch is one whole (a graph, a context set) that cannot be cut.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import MappingKey, register_pytree_node, tree_flatten_with_path, tree_leaves, tree_map
from torch.utils._pytree import keystr as path_of

Batch = Any  # a pytree of tensors, see above


@dataclass(frozen=True)
class OfTerm:
    """A batch of one term of a loss that has several.

    Attributes:
        term: which.
        batch: what its function takes.
    """

    term: int
    batch: Batch


register_pytree_node(
    OfTerm,
    lambda of_term: ([of_term.batch], of_term.term),
    lambda parts, term: OfTerm(term, next(iter(parts))),
    flatten_with_keys_fn=lambda of_term: ([(MappingKey(of_term.term), of_term.batch)], of_term.term),
)


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor in strided layout; sparse embeddings have sparse gradients."""
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def cast(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return a tensor on a device: in the floating type if it is floating, in its complex counterpart if complex."""
    if tensor.is_floating_point():
        return tensor.to(device, dtype)
    return tensor.to(device, dtype.to_complex()) if tensor.is_complex() else tensor.to(device)


def cast_batch(batch: Batch, dtype: torch.dtype, device: torch.device) -> Batch:
    """Return a batch on a device, cast as its tensors are."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):  # the lengths of its steps stay on the host, wherever the rest is
            parts = leaf._asdict() | {"batch_sizes": None}
            return type(leaf)(**{name: of(part) for name, part in parts.items()} | {"batch_sizes": leaf[1]})
        return cast(leaf.detach(), dtype, device) if isinstance(leaf, Tensor) else leaf

    return tree_map(of, batch, is_leaf=lambda node: isinstance(node, PackedSequence))


def detached(batch: Batch) -> Batch:
    """Return a batch outside of any graph."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, batch)


def copied(batch: Batch) -> Batch:
    """Return a batch that may be written into, outside of any graph."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, batch)


def sample_count(batch: Batch) -> int:
    """Count the samples of a batch: graphs, where the library of a batch of graphs counts them."""
    if (graphs := _graphs(batch)) is not None:
        return int(getattr(graphs, "num_graphs", 1))
    return next((_length(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def is_cuttable(batch: Batch) -> bool:
    """Whether every tensor has as many samples, so that some of them make a batch as well."""
    if (graphs := _graphs(batch)) is not None:
        return hasattr(graphs, "to_data_list")
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return all(leaf.ndim for leaf in leaves) and len({_length(leaf) for leaf in leaves}) == 1


def has_rows(batch: Batch) -> bool:
    """Whether samples are rows of plain tensors: not graphs, nor one whole, nor sparse or nested tensors."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    plain = all(leaf.layout == torch.strided and not leaf.is_nested for leaf in leaves)
    return plain and _graphs(batch) is None and is_cuttable(batch)


def take(batch: Batch, samples: slice | Tensor) -> Batch:
    """Return the batch of some samples of a batch."""
    if (graphs := _graphs(batch)) is not None:
        chosen = torch.arange(sample_count(batch))[samples].tolist()
        parts = graphs.to_data_list()
        part = type(graphs).from_data_list([parts[k] for k in chosen])
        return OfTerm(batch.term, part) if isinstance(batch, OfTerm) else part
    return tree_map(lambda leaf: _some(leaf, samples) if isinstance(leaf, Tensor) else leaf, batch)


def microbatches(batches: tuple[Batch, ...], most: int | None) -> Iterator[Batch]:
    """Cut batches into pieces of at most so many samples; None leaves them whole, as those are that cannot be cut."""
    for batch in batches:
        count = sample_count(batch)
        if most is None or count <= most or not is_cuttable(batch):
            yield batch
        else:
            yield from (take(batch, slice(start, start + most)) for start in range(0, count, most))


def byte_count(batches: tuple[Batch, ...], dtype: torch.dtype | None = None) -> int:
    """Count the bytes of all tensors, floating ones in another type where one is given."""
    leaves = [leaf for leaf in tree_leaves(batches) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() * _itemsize(leaf, dtype) for leaf in leaves)


def _itemsize(leaf: Tensor, dtype: torch.dtype | None) -> int:
    if dtype is None or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf.element_size()
    return dtype.itemsize * (2 if leaf.is_complex() else 1)


def digest(tree: Any) -> str:
    """Hash a pytree: structure, types, shapes and bytes of all tensors."""
    sha = hashlib.sha256()
    for path, leaf in tree_flatten_with_path(tree)[0]:
        sha.update(path_of(path).encode())
        if isinstance(leaf, Tensor):
            for part in leaf.detach().unbind() if leaf.is_nested else (leaf.detach(),):
                value = dense(part).cpu().contiguous().resolve_conj()
                sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
                sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(repr(leaf).encode())
    return sha.hexdigest()


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash parameters and buffers, whatever their order."""
    return digest(dict(sorted(tensors.items())))


def nan_report(batches: tuple[Batch, ...]) -> str:
    """Name the first tensor of data that holds NaN, as in "data: batch 0, leaf [0]: 1 of 35 values are NaN; "."""
    for index, batch in enumerate(batches):
        for path, leaf in tree_flatten_with_path(batch)[0]:
            if isinstance(leaf, Tensor) and not leaf.is_nested and (leaf.is_floating_point() or leaf.is_complex()):
                count = int(dense(leaf).isnan().sum())
                if count:
                    return f"data: batch {index}, leaf {path_of(path)}: {count} of {leaf.numel()} values are NaN; "
    return ""


def _graphs(batch: Batch) -> Any:
    """Return the object of torch_geometric that a batch is, None for any other batch."""
    batch = batch.batch if isinstance(batch, OfTerm) else batch
    return batch if any(kind.__module__.startswith("torch_geometric.") for kind in type(batch).__mro__) else None


def _length(leaf: Tensor) -> int:
    return len(leaf.unbind()) if leaf.is_nested else len(leaf)


def _some(leaf: Tensor, samples: slice | Tensor) -> Tensor:
    """Return some samples of one tensor, in whatever layout it is."""
    if leaf.is_nested:
        parts = leaf.unbind()
        chosen = torch.arange(len(parts))[samples].tolist()
        return torch.nested.nested_tensor([parts[k] for k in chosen], layout=leaf.layout)
    if leaf.layout == torch.strided:
        return leaf[samples]
    index = torch.arange(len(leaf), device=leaf.device)[samples]
    some: Tensor = leaf.to_sparse().index_select(0, index).to_sparse(layout=leaf.layout)
    return some
