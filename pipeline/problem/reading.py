"""Reading data into memory: whatever people have - tensors, arrays, graphs, loaders, mappings - as batches."""

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import (
    SUPPORTED_NODES,
    MappingKey,
    SequenceKey,
    register_pytree_node,
    tree_flatten_with_path,
    tree_leaves,
)
from torch.utils._pytree import keystr as path_of
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, default_collate

from pipeline.errors import HessianError, ProblemError, in_words
from pipeline.problem.batches import Batch, digest, is_cuttable, sample_count

_FLAGS = (bool, int, float, str)  # that a batch with names may hold


def read_batches(data: Any, *, separable: bool, bare: bool = False) -> tuple[Batch, ...]:
    """Read data into memory.

    Args:
        data: a tuple (one batch of tensors), a mapping or an object of tensors (one batch), a `Dataset`, a `DataLoader`
            of fixed order, or a re-iterable of batches.
        separable: whether samples are apart: if not, there is one batch, whose tensors need not agree in dimension 0.
        bare: whether a tensor alone is a batch: to an objective it may be.

    Returns:
        The batches.

    Raises:
        ProblemError: there is no data, its order is not fixed, samples are dropped, two passes differ, or a batch is
            not made of tensors that agree in dimension 0.
    """
    if _is_batch(data) or (bare and isinstance(data, Tensor | np.ndarray)):
        batches: tuple[Batch, ...] = (_tensors(data, "data"),)
    else:
        batches = _guarded(data)
        if digest(batches) != digest(_guarded(data)):
            raise ProblemError(
                "data: two passes gave different batches, and a Hessian is a sum over passes of the same data: "
                "switch off shuffling and random augmentation, or pass tensors"
            )
    if not batches:
        raise ProblemError("data: got no batches, expected at least one")
    if not separable and len(batches) > 1:
        raise ProblemError(
            f"got {len(batches)} batches of a loss that is not separable: its value depends on what is in "
            "a batch together, so pass all samples as one batch"
        )
    for index, batch in enumerate(batches):
        _check(batch, f"data: batch {index}", separable=separable)
    return batches


def recognise(batches: tuple[Batch, ...]) -> None:
    """Let pytrees reach the tensors of batches that were read in another process."""
    while found := [leaf for leaf in tree_leaves(batches) if _is_record(leaf)]:
        for record in found:
            _register(type(record))


def _is_batch(data: Any) -> bool:
    """Whether data are one batch, and not something that gives batches."""
    return isinstance(data, tuple | Mapping) or _is_record(data)


def _is_record(value: Any) -> bool:
    """Whether an object is a batch with tensors by name: of torch_geometric, or a dataclass."""
    is_data = dataclasses.is_dataclass(value) and not isinstance(value, type | Dataset | DataLoader)
    return is_data or _is_graph(value)


def _is_graph(value: Any) -> bool:
    """Whether an object is of torch_geometric, whose batches are of classes made as they are needed."""
    return any(kind.__module__.startswith("torch_geometric.data") for kind in type(value).__mro__)


def _guarded(data: Any) -> tuple[Batch, ...]:
    """Read all batches once, and turn what the user's code raises into an error of ours."""
    try:
        return _one_pass(data)
    except HessianError:
        raise
    except Exception as error:
        raise ProblemError(f"data: reading {type(data).__name__} raised {in_words(error)}") from error


def _one_pass(data: Any) -> tuple[Batch, ...]:
    """Read all batches once."""
    if isinstance(data, DataLoader):
        _check_loader(data)
        return tuple(_tensors(_collated(batch), f"data: batch {k}") for k, batch in enumerate(data))
    if isinstance(data, Dataset):
        samples = list(data) if isinstance(data, IterableDataset) else _samples(data)
        return (_tensors(_collated(_collate(samples)), "data"),) if samples else ()
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise ProblemError(
            f"data: got {type(data).__name__}, expected a tuple (inputs, target), a mapping, a Dataset, a DataLoader "
            "or a re-iterable of such tuples"
        )
    if iter(data) is data:
        raise ProblemError(
            f"data: got {type(data).__name__}, which can be read only once: pass a list of its batches instead"
        )
    return tuple(_tensors(batch, f"data: batch {k}") for k, batch in enumerate(data))


def _samples(data: Any) -> list[Any]:
    """Return all samples of a `Dataset`; one without a length ends where Python's own protocol says, at IndexError."""
    try:
        count = len(data)
    except (TypeError, NotImplementedError):
        return list(_until_the_end(data))
    return [data[k] for k in range(count)]


def _until_the_end(data: Any) -> Iterator[Any]:
    for k in itertools.count():
        try:
            yield data[k]
        except IndexError:
            return


def _collate(samples: list[Any]) -> Batch:
    """Make one batch of samples."""
    if _is_graph(samples[0]):
        return import_module("torch_geometric.data").Batch.from_data_list(samples)
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        raise ProblemError(
            f"data: samples of the Dataset do not fit into one batch ({in_words(error)}): pass a DataLoader with a "
            "collate_fn that pads them, or a list of batches"
        ) from error


def _check_loader(loader: DataLoader[Any]) -> None:
    """Refuse loaders that do not give all samples in one order."""
    if isinstance(loader.sampler, RandomSampler):
        raise ProblemError("data: the DataLoader shuffles: pass shuffle=False")
    if loader.batch_size is None and loader.batch_sampler is None and not isinstance(loader.dataset, IterableDataset):
        raise ProblemError("data: the DataLoader gives samples, not batches: pass its dataset, or say a batch_size")
    if loader.drop_last or getattr(loader.batch_sampler, "drop_last", False):
        raise ProblemError("data: the DataLoader drops its last batch, whose samples count as well: drop_last=False")


def _collated(value: Any) -> Any:
    """Turn the lists that collating makes of tuples back into tuples: several inputs, not a list as one input."""
    return tuple(map(_collated, value)) if type(value) in {list, tuple} else value


def _tensors(value: Any, where: str) -> Batch:
    """Turn arrays into tensors, mappings into dicts, and a batch that is a list into a tuple."""
    return _converted(tuple(value) if type(value) is list else value, where)


def _converted(value: Any, where: str) -> Any:
    if type(value) in {list, tuple}:
        return type(value)(_converted(item, f"{where}[{k}]") for k, item in enumerate(value))
    if isinstance(value, Mapping):  # tokenizers give mappings of their own
        return {key: _converted(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _tensor_of(value, where)
    if _is_record(value):
        _register(type(value))
    return value


def _tensor_of(array: np.ndarray[Any, Any], where: str) -> Tensor:
    """Turn an array into a tensor, whatever its byte order, its strides, its precision, or what its objects are."""
    if array.dtype == object:
        try:
            array = np.stack([np.asarray(item) for item in array.reshape(-1)]).reshape(*array.shape, -1)
            array = array[..., 0] if array.shape[-1] == 1 else array
        except (ValueError, TypeError):
            array = np.empty(0, object)
    if array.dtype.kind not in "biufc":
        raise ProblemError(
            f"{where}: got an array of dtype {array.dtype}, expected numbers in a regular shape: convert or pad it"
        )
    wide = np.complex128 if array.dtype.kind == "c" else np.float64
    kind = wide if array.dtype.kind in "fc" and array.dtype.itemsize > wide().itemsize else array.dtype
    return torch.from_numpy(np.ascontiguousarray(array.astype(np.dtype(kind).newbyteorder("="), copy=False)))


def _register(kind: type) -> None:
    """Let a pytree reach the tensors of a kind of object."""
    if kind in SUPPORTED_NODES:
        return
    parts, build = (_fields, _rebuilt) if dataclasses.is_dataclass(kind) else (_stores, _restored)
    register_pytree_node(
        kind,
        lambda value: (list(parts(value).values()), (value, tuple(parts(value)))),
        lambda values, context: build(context[0], dict(zip(context[1], values, strict=True))),
        flatten_with_keys_fn=lambda value: (
            [(MappingKey(key), part) for key, part in parts(value).items()],
            (value, tuple(parts(value))),
        ),
    )


def _fields(value: Any) -> dict[Any, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _rebuilt(value: Any, parts: dict[Any, Any]) -> Any:
    other = copy.copy(value)
    for name, part in parts.items():
        object.__setattr__(other, name, part)  # it may be frozen
    return other


def _stores(graph: Any) -> dict[Any, Any]:
    """Return what a graph of torch_geometric holds, by store and name; of one kind of nodes there is one store."""
    return {(k, name): store[name] for k, store in enumerate(_kept(graph)) for name in sorted(store.keys())}


def _kept(graph: Any) -> list[Any]:
    return list(graph.stores) if hasattr(graph, "stores") else [vars(graph)]


def _restored(graph: Any, parts: dict[Any, Any]) -> Any:
    other = copy.copy(graph)
    stores = _kept(other)
    for (k, name), part in parts.items():
        stores[k][name] = part
    return other


def _remedy(leaf: Any) -> str:
    """Say what to do about what is no tensor."""
    if isinstance(leaf, int | float):
        return "make one of numbers by torch.tensor, and a DataLoader of a list of samples"
    if hasattr(leaf, "to_numpy"):
        return "give its to_numpy()"
    return "leave it out of what the data set gives, or of what a loader's collate_fn makes of it"


def _check(batch: Batch, where: str, *, separable: bool) -> None:
    """Refuse a batch without samples, of what is no tensor, or of ragged leaves where samples are apart."""
    counts: dict[str, int] = {}
    for path, leaf in tree_flatten_with_path(batch)[0]:
        if leaf is None or (isinstance(leaf, _FLAGS) and path and not isinstance(path[-1], SequenceKey)):
            continue
        name = f"{where}, leaf {path_of(path)}"
        if not isinstance(leaf, Tensor):
            raise ProblemError(f"{name}: got {type(leaf).__name__}, expected a tensor: {_remedy(leaf)}")
        if leaf.ndim == 0 and separable:
            raise ProblemError(
                f"{name}: got a 0-d tensor, expected dimension 0 to be the sample: of a list each item is a batch; of "
                "samples make a DataLoader"
            )
        counts[name] = sample_count(leaf)
    listed = ", ".join(f"{n} in {name.rpartition(' ')[2]}" for name, n in counts.items()) or "no tensor"
    if not counts or 0 in counts.values():
        raise ProblemError(f"{where}: expected at least one sample, and as many in every tensor; got {listed}")
    if separable and not is_cuttable(batch) and not _is_record(batch):
        raise ProblemError(
            f"{where}: expected at least one sample, and as many in every tensor; got {listed}. Where they belong "
            "together (a graph, a context set, packed sequences), say separable=False: one batch, which is never cut"
        )
