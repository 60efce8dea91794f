"""What modules hold, as it was: attributes, and the lists and dicts in them, those of parameters and buffers too."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

_OTHERWISE = {"_modules", "training"}  # put back: a flag that is set tells submodules
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


class Kept:
    """What the modules of a model hold, and may hold otherwise later: a mask in a dict, a value made at the first call.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [m for m in model.modules() if not isinstance(m, LazyModuleMixin)]  # these become others, once
        self._attributes = [(m, _attributes(m)) for m in modules]
        found: dict[int, Any] = {}
        for _, attributes in self._attributes:
            _find(attributes.values(), found)
        self._containers = [(container, _content(container)) for container in found.values()]

    def is_as_it_was(self) -> bool:
        """Whether nothing was replaced, added or taken away."""
        attributes = all(_same(_content(_attributes(m)), _content(before)) for m, before in self._attributes)
        return attributes and all(_same(_content(c), before) for c, before in self._containers)

    def put_back(self) -> None:
        """Undo what was replaced, added or taken away."""
        for module, before in self._attributes:
            now = _attributes(module)
            if not _same(_content(now), _content(before)):
                for name in now.keys() - before.keys():
                    del module.__dict__[name]
                module.__dict__.update(before)
        for container, content in self._containers:
            if not _same(_content(container), content):
                _fill(container, content)


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Have a model hold afterwards what it did before; see `Kept`."""
    kept = Kept(model)
    try:
        yield
    finally:
        kept.put_back()


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OTHERWISE}


def _content(container: Any) -> list[Any]:
    """Return what is in a container, in its order; of a mapping, its keys and then its values."""
    return [*container, *container.values()] if isinstance(container, dict) else list(container)


def _fill(container: Any, content: list[Any]) -> None:
    """Have a container hold what `_content` gave of it."""
    container.clear()
    if isinstance(container, dict):
        half = len(content) // 2
        container.update(zip(content[:half], content[half:], strict=True))
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


def _find(values: Iterable[Any], found: dict[int, Any]) -> None:
    """Find the containers among values, and inside them; by identity."""
    waiting: list[Iterator[Any]] = [iter(values)]
    while waiting:
        for value in waiting.pop():
            if type(value) in _CONTAINERS and id(value) not in found:
                found[id(value)] = value
                waiting.append(iter(list(value.values() if isinstance(value, dict) else value)))


def _same(now: list[Any], before: list[Any]) -> bool:
    """Whether contents are the same objects, in the same order."""
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))
