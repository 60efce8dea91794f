"""Where each parameter lies in the Hessian: flat indices, in order, row-major within a parameter."""

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.errors import BlockError, nearest


@dataclass(frozen=True)
class Parameter:
    """A named tensor of the model and the flat index of its first entry."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)

    @property
    def span(self) -> range:
        """Flat indices of the parameter."""
        return range(self.offset, self.offset + self.size)

    @property
    def place(self) -> slice:
        """The same, to index with."""
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class ParameterLayout:
    """The selected parameters in the order of the Hessian's rows and columns."""

    parameters: tuple[Parameter, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, Iterable[int]] | Iterable[tuple[str, Iterable[int]]]) -> "ParameterLayout":
        """Lay out parameters one after the other.

        Args:
            shapes: parameter names with their shapes, in order.

        Returns:
            The layout.
        """
        parameters, offset = [], 0
        for name, shape in shapes.items() if isinstance(shapes, Mapping) else shapes:
            parameters.append(Parameter(name, tuple(shape), offset))
            offset += parameters[-1].size
        return cls(tuple(parameters))

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> "ParameterLayout":
        """Rebuild a layout from its table, as `to_json` gives it."""
        return cls.of([(row["name"], row["shape"]) for row in rows])

    def to_json(self) -> list[dict[str, Any]]:
        """Return the table of name, shape, offset and size."""
        return [{"name": p.name, "shape": list(p.shape), "offset": p.offset, "size": p.size} for p in self.parameters]

    @property
    def size(self) -> int:
        """P, the number of rows of the Hessian."""
        return self.parameters[-1].span.stop if self.parameters else 0

    @cached_property
    def _by_name(self) -> dict[str, Parameter]:
        return {p.name: p for p in self.parameters}

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(self._by_name)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, name: str) -> Parameter:
        try:
            return self._by_name[name]
        except KeyError:
            raise BlockError(f"no parameter `{name}`{nearest(name, self.names)}") from None

    def segments(self, span: range) -> Iterator[tuple[Parameter, range]]:
        """Split flat indices at parameter borders.

        Args:
            span: consecutive flat indices.

        Yields:
            Each parameter met, with the flat indices of it that lie in the span.
        """
        for p in self.parameters:
            start, stop = max(span.start, p.offset), min(span.stop, p.span.stop)
            if start < stop:
                yield p, range(start, stop)


def choose(names: Sequence[str], globs: Sequence[str], nothing_matches: Callable[[str], Exception]) -> tuple[str, ...]:
    """Choose names by globs, one after the other; `!glob` takes out: of all names, where every glob does.

    Args:
        names: to choose from.
        globs: of names.
        nothing_matches: makes the error for a glob that matches nothing.

    Returns:
        Those chosen, in their own order.
    """
    chosen: set[str] = set(names) if globs and all(glob.startswith("!") for glob in globs) else set()
    for glob in globs:
        matches = set(fnmatch.filter(names, glob.removeprefix("!")))
        if not matches:
            raise nothing_matches(glob)
        chosen = chosen - matches if glob.startswith("!") else chosen | matches
    return tuple(name for name in names if name in chosen)
