"""What modules hold, as it was: attributes, and the lists and dicts in them, those of parameters and buffers too."""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

MOST = 1000  # items of a container that is looked into: a vocabulary is read; of a longer history, what it grows by
IN_ALL = 5000  # items of all containers that are looked into
_OTHERWISE = {"training"}  # put back: a flag that is set tells submodules


class Kept:
    """What the modules of models hold, and may hold otherwise later: a mask in a dict, a value made at the first call.

    Args:
        models: the models.

    Attributes:
        tensors: among it, by identity.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        self._long: list[tuple[Any, int]] = []
        self._items = 0  # of the containers that are looked into
        self.tensors: dict[int, Tensor] = {}
        self._look_at(models)

    def _look_at(self, models: Iterable[nn.Module]) -> None:
        """Walk through what models hold, nearest first: all attributes, and so many items."""
        waiting: deque[Iterable[Any]] = deque(model.modules() for model in models)
        seen: set[int] = set()
        while waiting and self._items < IN_ALL:
            for value in waiting.popleft():
                if id(value) not in seen and (inside := self._inside(value)) is not None:
                    seen.add(id(value))
                    waiting.append(inside)

    def _inside(self, value: Any) -> Iterable[Any] | None:
        """Note what a value holds, and return it; None of what is not looked into."""
        if isinstance(value, Tensor):
            self.tensors[id(value)] = value
        elif isinstance(value, tuple):
            return value if len(value) <= MOST else None
        elif isinstance(value, dict | list | set | deque):
            if len(value) <= MOST:
                self._items += len(value)
                self._containers.append((value, _content(value)))
                return list(_kind(value).values(value) if isinstance(value, dict) else value)
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
def put_back(*models: nn.Module) -> Iterator[None]:
    """Have models hold afterwards what they did before; see `Kept`."""
    kept = Kept(*models)
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
    if isinstance(container, dict):
        kind = _kind(container)
        return [*kind.keys(container), *kind.values(container)]
    return list(container)


def _fill(container: Any, content: list[Any]) -> None:
    """Have a container hold what `_content` gave of it."""
    if isinstance(container, dict):
        kind, half = _kind(container), len(content) // 2
        kind.clear(container)
        for key, value in zip(content[:half], content[half:], strict=True):
            kind.__setitem__(container, key, value)
        return
    container.clear()
    if isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


def _kind(container: dict[Any, Any]) -> Any:
    """Return the class whose methods read and write a mapping: those of its own may refuse, or give something else."""
    return OrderedDict if isinstance(container, OrderedDict) else dict


def _same(now: list[Any], before: list[Any]) -> bool:
    """Whether contents are the same objects, in the same order."""
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
