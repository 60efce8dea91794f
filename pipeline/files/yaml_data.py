"""YAML as strangers may write it: plain data within bounds, and every fault in one line of ours."""

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import SpecError, UnfitError
from pipeline.files.local import read_regular

MOST_BYTES = 2**18  # of a file; more takes seconds
MOST_DEPTH = 32
MOST_NODES = 20_000  # with aliases and merges written out
MOST_DIGITS = 100  # of a number
MOST_SAID = 300  # characters of what the parser says, which quotes names of any length


def load_yaml(text: str | bytes, source: str) -> Any:
    """Read plain data from YAML.

    Args:
        text: the YAML.
        source: named in errors.

    Returns:
        The data.

    Raises:
        SpecError: it is no YAML, or goes beyond the bounds of this module.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = str(error.problem or error.context)
        said = said if len(said) <= MOST_SAID else f"{said[:MOST_SAID]} ..."
        raise SpecError(f"{source}: not valid YAML ({place}{said})") from None
    except (yaml.YAMLError, UnicodeError):
        raise SpecError(f"{source}: not valid YAML (it holds characters that YAML does not allow)") from None


def read_yaml(path: str | Path, what: str) -> Any:
    """Read plain data from a YAML file.

    Args:
        path: of it.
        what: it is, in errors.

    Returns:
        The data.

    Raises:
        SpecError: it cannot be read; see `load_yaml`.
    """
    try:
        data = read_regular(path, MOST_BYTES)
    except UnfitError as error:
        raise SpecError(f"{path}: the {what} {error}") from None
    except (OSError, ValueError) as error:  # a ValueError of a name that no file can have
        raise SpecError(f"{path}: cannot read the {what} ({getattr(error, 'strerror', None) or error})") from None
    return load_yaml(data, str(path))


class _Loader(yaml.SafeLoader):
    """Refuses what is too deep or too much while it is read, and says what cannot be made of a text, and where."""

    def __init__(self, text: str | bytes) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # of nodes that were read, aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Read a node, or find the one that an alias names."""
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise self._fault(f"deeper than {MOST_DEPTH} levels", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and self._size(node) > MOST_NODES:
            raise self._fault(f"more than {MOST_NODES:,} values, aliases written out", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping, whose keys are told apart."""
        node = super().compose_mapping_node(anchor)
        self._sizes[id(node)] = 1 + sum(self._size(part) for pair in node.value for part in pair)
        return node

    def compose_sequence_node(self, anchor: Any) -> yaml.SequenceNode:
        """Read a sequence."""
        node = super().compose_sequence_node(anchor)
        self._sizes[id(node)] = 1 + sum(map(self._size, node.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make a value of a node."""
        if (
            isinstance(node, yaml.ScalarNode)
            and node.tag.endswith((":int", ":float"))
            and len(node.value) > MOST_DIGITS
        ):
            raise self._fault(f"a number of {len(node.value):,} characters", node.start_mark)
        try:
            return super().construct_object(node, deep=deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            kind = node.tag.rpartition(":")[2]
            raise self._fault(f"what is written here is no {kind}", node.start_mark) from None

    def _size(self, node: yaml.Node) -> int:
        """Return the values that a node comes to."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in self._sizes:
            raise self._fault("an alias of what it lies in", node.start_mark)
        return self._sizes[id(node)]

    @staticmethod
    def _fault(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
