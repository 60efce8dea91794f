"""What modules hold, as it was: attributes, and the lists and dicts in them, those of parameters and buffers too."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

MOST = 1000  # items of a container that is looked into: a vocabulary is read; of a longer history, what it grows by
_OTHERWISE = {"training"}  # put back: a flag that is set tells submodules


class Kept:
    """What the modules of a model hold, and may hold otherwise later: a mask in a dict, a value made at the first call.

    Args:
        model: the model.

    Attributes:
        tensors: those among it that are no parameters or buffers, by identity.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        self._long: list[tuple[Any, int]] = []
        self.tensors: dict[int, Tensor] = {}
        self._look_at(model)

    def _look_at(self, model: nn.Module) -> None:
        """Walk through all that a model holds."""
        waiting: list[Iterator[Any]] = [iter(model.modules())]
        seen: set[int] = set()
        while waiting:
            for value in waiting.pop():
                if id(value) not in seen and (inside := self._inside(value)) is not None:
                    seen.add(id(value))
                    waiting.append(iter(inside))

    def _inside(self, value: Any) -> Iterable[Any] | None:
        """Note what a value holds, and return it; None of what is not looked into."""
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
        elif isinstance(value, tuple):
            return value if len(value) <= MOST else None
        elif isinstance(value, dict | list | set | deque):
            if len(value) <= MOST:
                self._containers.append((value, _content(value)))
                return list(value.values() if isinstance(value, dict) else value)
            self._long.append((value, len(value)))
        elif _has_attributes(value):
            self._attributes.append((value, _attributes(value)))
            return self._attributes[-1][1].values()
        return None

    def is_as_it_was(self) -> bool:
        """Whether nothing was replaced, added or taken away."""
        attributes = all(_same(_content(_attributes(m)), _content(before)) for m, before in self._attributes)
        contents = all(_same(_content(c), before) for c, before in self._containers)
        return attributes and contents and all(len(container) == length for container, length in self._long)

    def put_back(self) -> None:
        """Undo what was replaced, added or taken away."""
        for holder, before in self._attributes:
            now = _attributes(holder)
            if not _same(_content(now), _content(before)):
                for name in now.keys() - before.keys():
                    del holder.__dict__[name]
                holder.__dict__.update(before)
        for container, content in self._containers:
            if not _same(_content(container), content):
                _fill(container, content)
        for container, length in self._long:
            while len(container) > length and not isinstance(container, set):
                container.popitem() if isinstance(container, dict) else container.pop()


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Have a model hold afterwards what it did before; see `Kept`."""
    kept = Kept(model)
    try:
        yield
    finally:
        kept.put_back()


def _has_attributes(value: Any) -> bool:
    """Whether a value is a module, or a plain record; lazy modules become others, once."""
    if isinstance(value, nn.Module):
        return not isinstance(value, LazyModuleMixin)
    is_record = isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type))
    return is_record and hasattr(value, "__dict__")


def _attributes(holder: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(holder).items() if name not in _OTHERWISE}


def _content(container: Any) -> list[Any]:
    """Return what is in a container, in its order; of a mapping, its keys and then its values."""
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _fill(container: Any, content: list[Any]) -> None:
    """Have a container hold what `_content` gave of it."""
    container.clear()
    if isinstance(container, dict):
        half = len(content) // 2
        for key, value in zip(content[:half], content[half:], strict=True):
            container[key] = value
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


def _same(now: list[Any], before: list[Any]) -> bool:
    """Whether contents are the same objects, in the same order."""
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
