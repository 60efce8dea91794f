"""What a page is made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.analysis.pictures.canvas import Picture

MOST_ROWS = 200  # of a table on a page: Python and the commands give all


@dataclass(frozen=True)
class Table:
    """The numbers beneath a picture.

    Attributes:
        columns: their heads.
        rows: texts.
        left_out: rows that there would be beside them.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left_out: int = 0

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> "Table":
        """Make a table of values; numbers are written in few digits."""
        texts = [[as_text(value) for value in row] for row in rows]
        return cls(columns, texts[:MOST_ROWS], max(len(texts) - MOST_ROWS, 0))


@dataclass(frozen=True)
class Zoom:
    """A map that the page enlarges.

    Attributes:
        png: a pixel for each row and column of the map.
        names: of the parameters.
        starts: where each begins, and the number of pixels on a side.
        sizes: rows of each parameter.
    """

    png: bytes
    names: Sequence[str]
    starts: Sequence[int]
    sizes: Sequence[int]


@dataclass(frozen=True)
class Part:
    """A section.

    Attributes:
        id: its name in links and in what is left out.
        title: its head.
        text: paragraphs.
        pictures: drawn.
        table: of the same numbers.
        zoom: a map to look into.
        unfolded: whether the table is seen at once.
    """

    id: str
    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    table: Table | None = None
    zoom: Zoom | None = None
    unfolded: bool = False


@dataclass(frozen=True)
class Page:
    """All of a page.

    Attributes:
        title: its head.
        subtitle: a line below it.
        verdict: what was proven, in a few words; None where there is nothing to prove.
        proven: whether it was.
        facts: numbers at the top, by name.
        about: the other facts, folded.
        parts: sections.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    parts: Sequence[Part]
    verdict: str | None = None
    proven: bool = False
    about: Table | None = None

    @property
    def pictures(self) -> list[Picture]:
        """Those of all sections."""
        return [picture for part in self.parts for picture in part.pictures]


def as_text(value: object) -> str:
    """Write a value for a table."""
    if isinstance(value, bool | str) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
