"""What was measured of a network, remembered for the next of its kind on this machine: a schedule measures once.

Which engines are right is found anew for each problem; what is kept is how fast they are, with which sizes, and what
they hold. It lies in the user's folder of caches, or in that which `HESSIAN_CACHE` names; nowhere where that is empty.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import platformdirs
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from pipeline.errors import UnfitError
from pipeline.files.local import read_regular, replace_file
from pipeline.planning.costs import Finishing, Measured, Timing
from pipeline.planning.verdict import EngineSizes, PreflightVerdict
from pipeline.problem.problem import Problem

ENVIRONMENT = "HESSIAN_CACHE"
MOST_BYTES = 2**26  # of a file


@dataclass(frozen=True)
class Measurements:
    """What was measured of a network.

    Attributes:
        engines: the faster of those that are right, by parameter.
        sizes: by engine.
        costs: measured, by row parameter.
        engine_bytes: the largest peak.
        timings: of calls as the run makes them.
        finishing: seconds of what comes after the engines.
        proof_seconds: predicted.
    """

    engines: dict[str, str]
    sizes: dict[str, EngineSizes]
    costs: dict[str, Measured]
    engine_bytes: int
    timings: dict[str, Timing]
    finishing: Finishing
    proof_seconds: float

    def suits(self, verdict: PreflightVerdict) -> bool:
        """Whether it tells of all parameters, and takes no engine for them that is not right here."""
        found = verdict.parameters
        return (
            self.engines.keys() == found.keys()
            and all(self.engines[name] in {each.engine, each.rival} for name, each in found.items())
            and set(self.engines.values()) <= self.sizes.keys()
        )


_MEASUREMENTS = TypeAdapter(Measurements)


def folder() -> Path | None:
    """Return where measurements are kept; None where they are not."""
    named = os.environ.get(ENVIRONMENT)
    if named is not None:
        return Path(named) if named else None
    return platformdirs.user_cache_path("hessian-pipeline") / "measured"


def kept() -> list[Path]:
    """Return the files of measurements."""
    place = folder()
    return sorted(place.glob("*.json")) if place else []


def kind(problem: Problem, *about: Any) -> str:
    """Identify problems that take as long: by their code and shapes, whatever their numbers.

    Args:
        problem: with its parameters selected.
        about: what else seconds and bytes depend on, such as settings and the machine; told by its repr.

    Returns:
        A digest.
    """
    sha = hashlib.sha256(repr(about).encode())
    sha.update(json.dumps(problem.layout.to_json()).encode())
    for module in problem.modules:
        tensors = [*module.named_parameters(), *module.named_buffers()]
        sha.update(f"{module}{[(name, _shape(t)) for name, t in tensors]}".encode())
        for each in {type(each): None for each in module.modules()}:
            sha.update(b"".join(_class_code(each)))
    for function in problem.functions:
        sha.update(b"".join(_code(function)))
    leaves, structure = tree_flatten(problem.batches)
    sha.update(f"{[_shape(leaf) for leaf in leaves]}{structure}".encode())
    sha.update(f"{problem.reduction} {problem.separable} {bool(problem.l2)} {torch.get_num_threads()}".encode())
    return sha.hexdigest()


def recall(name: str, verdict: PreflightVerdict) -> Measurements | None:
    """Return what was measured of a kind.

    Args:
        name: of the kind.
        verdict: of preflight, on the problem at hand.

    Returns:
        The measurements; None where there are none, or what is there cannot be read or is of something else.
    """
    place = folder()
    if place is None:
        return None
    with suppress(OSError, UnfitError, ValidationError):
        found = _MEASUREMENTS.validate_json(read_regular(place / f"{name}.json", MOST_BYTES))
        return found if found.suits(verdict) else None
    return None


def remember(name: str, found: Measurements) -> None:
    """Keep what was measured of a kind, where there is room: it is no reason to fail."""
    place = folder()
    if place is not None:
        with suppress(OSError):
            replace_file(place / f"{name}.json", [_MEASUREMENTS.dump_json(found)], lasting=False)


def forget() -> int:
    """Remove what was measured; return the number of networks."""
    files = kept()
    for path in files:
        path.unlink(missing_ok=True)
    return len(files)


def _shape(leaf: Any) -> Any:
    return (tuple(leaf.shape), str(leaf.dtype)) if isinstance(leaf, Tensor) and not leaf.is_nested else type(leaf)


def _class_code(kind: type) -> Iterator[bytes]:
    """Give the code of a class of the user's, and of those it inherits."""
    for each in kind.__mro__:
        yield f"{each.__module__}.{each.__qualname__}".encode()
        if each is not object and not each.__module__.startswith("torch."):
            for value in vars(each).values():
                yield from _code(value)


def _code(value: Any) -> Iterator[bytes]:
    """Give the byte code of a function, and of those in it; of what else there is, its type."""
    if isinstance(value, partial):
        yield from (part for each in (value.func, *value.args, *value.keywords.items()) for part in _code(each))
        return
    if isinstance(value, staticmethod | classmethod | MethodType):
        value = value.__func__
    if isinstance(value, FunctionType):
        value = inspect.unwrap(value).__code__
    if not isinstance(value, CodeType):
        yield repr(value if isinstance(value, nn.Module | str | float | int) else type(value)).encode()
        return
    yield value.co_code + repr(value.co_names).encode()
    for constant in value.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:  # a set has another order in each process
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode()
