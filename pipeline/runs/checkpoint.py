"""Weights from a checkpoint: safetensors or `torch.save`, at any URL, checked against the model.

A file of `torch.save` is a pickle, which is a program. It is read with `weights_only`, which runs none of it: what is
not a tensor or a plain container is refused.
"""

import hashlib
import io
import pickle
import re
import zipfile
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.errors import CheckpointError, MemoryRefusedError, UnfitError, human_bytes, in_words, nearest
from pipeline.planning.memory import available_bytes
from pipeline.problem.batches import dense
from pipeline.problem.problem import Problem
from pipeline.problem.selection import check_finite
from pipeline.spec import brief
from pipeline.storage.filesystems import at_once, explained, open_filesystem, read_bounded
from pipeline.storage.retries import patient
from pipeline.urls import Url

_COMPILED = "_orig_mod."  # put into names by torch.compile, at any depth
_PARALLEL = "module."  # put before all names by DataParallel and DistributedDataParallel
_SHOWN = 4  # names of each kind of fault
_MOST_MAPPINGS, _DEEPEST = 100_000, 16  # that are looked through for tensors, and levels of them
_MOST_PICKLE = 2**23  # bytes: 50,000 tensors
_COPIES = 2  # of the file in memory: its bytes and its tensors


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's file.

    Attributes:
        url: of it.
        data: its bytes.
        sha256: of these.
        key_name: what says where in it the weights are, in errors: an argument, or a job's key.
    """

    url: Url
    data: bytes = field(repr=False)
    sha256: str
    key_name: str = "key"

    def tensors(self, key: str | None = None) -> dict[str, Tensor]:
        """Read its tensors, on the CPU.

        Args:
            key: where they are, names of mappings with dots between; what is left of it at a mapping of tensors is the
                beginning of their names, and is taken off.

        Returns:
            The tensors by name.

        Raises:
            CheckpointError: it is neither a safetensors nor a `torch.save` file, holds more than data, or has no
                tensors there.
        """
        found, rest = self._content(), key
        while not _are_tensors(found) and rest:
            name, _, rest = rest.partition(".")
            found = self._enter(found, name)
        if not _are_tensors(found):
            raise CheckpointError(f"checkpoint {self.url}: {_no_tensors(found, key, self.key_name)}")
        if not rest:
            return dict(found)
        inside = {name.removeprefix(f"{rest}."): t for name, t in found.items() if name.startswith(f"{rest}.")}
        if not inside:
            raise CheckpointError(
                f"checkpoint {self.url}: `{self.key_name}` got {key!r}, but no name begins with `{rest}.`"
                f"{nearest(rest, sorted({name.split('.')[0] for name in found}))}"
            )
        return inside

    def _content(self) -> Any:
        """Read the file by what it begins with, whatever its name."""
        try:
            if _is_safetensors(self.data):
                return safetensors.torch.load(self.data)
            archive = zipfile.is_zipfile(io.BytesIO(self.data))
            if archive:
                _require_plain(self.data)
            if archive or self.data[:1] == b"\x80":
                return torch.load(io.BytesIO(self.data), map_location="cpu", weights_only=True)
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint {self.url}: cannot be read as safetensors ({error})") from None
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"checkpoint {self.url}: holds more than tensors and plain containers ({_beyond_data(error)}), none of "
                "which was run: save the state dict alone, by torch.save(model.state_dict(), ...) or safetensors"
            ) from None
        except Exception as error:  # of damage: torch raises what it happens to stumble over
            raise CheckpointError(f"checkpoint {self.url}: cannot be read by torch.load ({in_words(error)})") from None
        raise CheckpointError(
            f"checkpoint {self.url}: got {len(self.data):,} bytes that begin with {self.data[:8]!r}, expected a "
            "safetensors file or one of torch.save"
        )

    def _enter(self, found: Any, name: str) -> Any:
        """Return what a mapping has under a name."""
        if not isinstance(found, Mapping) or name not in found:
            known = list(map(_key, found)) if isinstance(found, Mapping) else [f"a {type(found).__name__}"]
            raise CheckpointError(f"checkpoint {self.url}: `{self.key_name}` finds no `{name}`{nearest(name, known)}")
        return found[name]


def read_checkpoint(url: str, endpoint_url: str | None = None, key_name: str = "key") -> Checkpoint:
    """Read a checkpoint's file.

    Args:
        url: a path or an fsspec URL.
        endpoint_url: of its server, where it is not the cloud's own or the environment's.
        key_name: what says where in it the weights are, in errors.

    Returns:
        The file.

    Raises:
        CheckpointError: there is none.
        MemoryRefusedError: it does not fit into memory.
        OutputError: its store refuses.
    """
    shown = Url(url)
    fs, path = open_filesystem(shown, endpoint_url, "checkpoint")
    if fs.async_impl:
        at_once(fs, shown, "cannot be read", (fs._exists, path), noun="checkpoint")
    with explained(shown, "cannot be read", "checkpoint"):
        try:
            size = patient(fs.info)(path)["size"]
            if size is None:
                raise CheckpointError(f"checkpoint {shown}: its server does not say how large it is")
            needed, free = _COPIES * size, available_bytes()
            if needed > free:
                raise MemoryRefusedError(
                    f"checkpoint {shown}: reading it needs {human_bytes(needed)}, {human_bytes(free)} are free"
                )
            data = patient(read_bounded)(fs, path, max(size, 1))
        except FileNotFoundError:
            raise CheckpointError(f"checkpoint {shown}: there is no such file") from None
        except IsADirectoryError:
            raise CheckpointError(f"checkpoint {shown}: is a folder, expected a file") from None
        except UnfitError as error:
            raise CheckpointError(f"checkpoint {shown}: {error}") from None
    return Checkpoint(shown, data, hashlib.sha256(data).hexdigest(), key_name)


def load_checkpoint(problem: Problem, url: str, key: str | None = None, *, endpoint_url: str | None = None) -> Problem:
    """Return a problem at a checkpoint's weights; the model stays as it is.

    Args:
        problem: of the model that the checkpoint is of.
        url: a safetensors file or one of `torch.save`, by path or fsspec URL.
        key: where in the file the weights are, as `model` or `state_dict.model`; None for all of it.
        endpoint_url: of its server, where it is not the cloud's own or the environment's.

    Returns:
        The problem; its `checkpoint` is the SHA-256 of the file.

    Raises:
        CheckpointError: there is no such file, it is not one of weights alone, or these are not the model's.
        ProblemError: weights are NaN or infinite.
        OutputError: its store refuses.
    """
    return place_checkpoint(problem, read_checkpoint(url, endpoint_url), key)


def place_checkpoint(problem: Problem, checkpoint: Checkpoint, key: str | None = None) -> Problem:
    """Return a problem at the weights in a checkpoint's file; see `load_checkpoint`."""
    given = checkpoint.tensors(key)
    own = problem.tensors()
    values, faults = _fit(problem.model, own, given)
    if faults:
        hint = _elsewhere(problem.model.state_dict(), given, checkpoint.key_name)
        raise CheckpointError(f"checkpoint {checkpoint.url} does not fit the model: {'; '.join(faults)}{hint}")
    parameters = {name for name, _ in problem.model.named_parameters()}
    check_finite({name: t for name, t in values.items() if name in parameters}, f"checkpoint {checkpoint.url}")
    return problem.at({**own, **values}, checkpoint.sha256)


def _fit(
    model: nn.Module, own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return for each of the model's tensors the value that is there for it, and what is wrong."""
    places, needed = _places(model, own)
    known = _plain(places)
    values: dict[str, Tensor] = {}
    faults = []
    named = {known[name]: (original, given[original]) for name, original in _plain(given).items() if name in known}
    extra = [original for name, original in _plain(given).items() if name not in known]
    for place, (original, tensor) in named.items():
        name = places[place]
        value, fault = _converted(tensor, own[name])
        if value is None:
            faults.append(f"`{brief(original)}` {fault}")
        elif name in values and not torch.equal(values[name], value):
            faults.append(f"`{brief(original)}` is tied to `{name}` in the model, but has other values")
        else:
            values[name] = value
    found = {places[place] for place in named}
    missing = [name for name in needed if name not in found]
    lists = [f"{word} {_listed(names)}" for word, names in (("missing", missing), ("not in the model", extra)) if names]
    return values, [*lists, *faults[:_SHOWN], *([f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else [])]


def _places(model: nn.Module, own: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """Return all names a state dict may have, with those that tensors go by here, and the ones that it must have."""
    tensors = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    state = model.state_dict(keep_vars=True)  # tied tensors and shared modules by all their names
    places = {name: tensors[id(t)] for name, t in state.items() if id(t) in tensors}
    needed = list(dict.fromkeys(places.values()))
    return {**{name: name for name in own}, **places}, needed  # buffers that no state dict has may be given


def _plain(names: Mapping[str, Any]) -> dict[str, str]:
    """Take off what wrappers of a model put into its names; gives the names as they were."""
    plain = {name.replace(_COMPILED, ""): name for name in names}
    while plain and all(name.startswith(_PARALLEL) for name in plain):
        plain = {name.removeprefix(_PARALLEL): original for name, original in plain.items()}
    return plain if len(plain) == len(names) else {name: name for name in names}


def _converted(tensor: Tensor, own: Tensor) -> tuple[Tensor | None, str]:
    """Return a tensor in the model's type, or why there is none: never by rounding."""
    if tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        return None, "holds no plain values"
    if tensor.shape != own.shape:
        return None, f"has shape {tuple(tensor.shape)}, expected {tuple(own.shape)}"
    values = dense(tensor.detach())
    for kind in ("is_floating_point", "is_complex"):
        if getattr(values, kind)() != getattr(own, kind)():
            return None, f"is {values.dtype}, expected {own.dtype}"
    converted = values.to(own.dtype)
    if not bool(((converted.to(values.dtype) == values) | values.isnan()).all()):
        return None, (
            f"is {values.dtype} and would be rounded to {own.dtype}: make the model of that type in the factory, as "
            "by model.double()"
        )
    return converted.contiguous().clone(), ""


def _elsewhere(own: Mapping[str, Tensor], given: Mapping[str, Tensor], key_name: str) -> str:
    """Return what to try where the model's names are there under a common beginning."""
    for name in given:
        prefix = next((name.removesuffix(f".{mine}") for mine in own if name.endswith(f".{mine}")), None)
        if prefix and all(f"{prefix}.{mine}" in given for mine in own):
            return f"; the model's names are there after `{prefix}.`: give {key_name}, `{prefix}` at its end"
    return ""


def _is_safetensors(data: bytes) -> bool:
    """Whether a file begins with the length of a header, and the header."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8


def _are_tensors(found: Any) -> bool:
    return (
        isinstance(found, Mapping)
        and bool(found)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items())
    )


def _no_tensors(found: Any, key: str | None, key_name: str) -> str:
    """Return what is where tensors were expected, and where they might be."""
    where = f"at `{key}`" if key else "in it"
    if not isinstance(found, Mapping):
        return f"{where} is a {type(found).__name__}, expected tensors by name"
    within = _tensors_within(found, f"{key}." if key else "")
    hint = f"say where the weights are, as by {key_name}: {brief(within)}" if within else "it has no tensors by name"
    return f"{where} are {_listed(map(_key, found))}, expected tensors by name; {hint}"


def _tensors_within(found: Mapping[Any, Any], before: str) -> str | None:
    """Return the nearest key at which there are tensors by name; a mapping in several places is looked at once."""
    seen, waiting = {id(found)}, deque([(before, found)])
    while waiting and waiting[0][0].count(".") < _DEEPEST:
        before, mapping = waiting.popleft()
        for name, value in mapping.items():
            if not isinstance(name, str) or not isinstance(value, Mapping) or id(value) in seen:
                continue
            if _are_tensors(value):
                return f"{before}{name}"
            seen.add(id(value))
            if len(seen) > _MOST_MAPPINGS:
                return None
            waiting.append((f"{before}{name}.", value))
    return None


def _key(name: object) -> str:
    """Return a key as it is shown; to write out one that is no text might take for ever."""
    return name if isinstance(name, str) else f"a {type(name).__name__}"


def _listed(names: Iterable[str]) -> str:
    quoted = [f"`{brief(name)}`" for name in names]
    return ", ".join(quoted[:_SHOWN]) + (f" and {len(quoted) - _SHOWN} more" if len(quoted) > _SHOWN else "")


def _require_plain(data: bytes) -> None:
    """Refuse an archive that comes to more than its own size, or whose pickle is no list of tensors."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
    if sum(member.file_size for member in members) > len(data):
        raise ValueError("its members are larger than the file, which torch.save does not compress")
    if any(member.file_size > _MOST_PICKLE for member in members if member.filename.endswith("data.pkl")):
        raise ValueError(f"its pickle has more than {_MOST_PICKLE:,} bytes, apart from tensors")


def _beyond_data(error: pickle.UnpicklingError) -> str:
    """Return what torch would not run."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"`{found[1]}`" if found else in_words(error)
