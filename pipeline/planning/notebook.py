"""What a notebook shows of an object: a few numbers, and a table, folded. Names are text, whatever they are."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from pipeline.errors import shown

MOST_ROWS = 200  # of a table
_SMALL = "width:14em;image-rendering:pixelated"


def card(
    title: str,
    values: Iterable[tuple[str, str]],
    folded: str = "",
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
    picture: bytes | None = None,
) -> str:
    """Write it as HTML.

    Args:
        title: a line.
        values: names and values, those that there are.
        folded: what the table is of.
        columns: its heads.
        rows: its texts.
        picture: a PNG.

    Returns:
        HTML without scripts, that asks for nothing else.
    """
    parts = [f"<div><strong>{_text(title)}</strong>"]
    if picture is not None:
        data = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        parts.append(f'<div><img alt="Map of its blocks" src="{data}" style="{_SMALL}"></div>')
    parts.append(_table((), [(name, value) for name, value in values if value]))
    if rows:
        more = f"<p>and {len(rows) - MOST_ROWS:,} more</p>" if len(rows) > MOST_ROWS else ""
        inside = _table(columns, rows[:MOST_ROWS])
        parts.append(f"<details><summary>{_text(folded)}</summary>{inside}{more}</details>")
    return "".join([*parts, "</div>"])


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row("th", columns)] if columns else []
    return f"<table>{''.join([*lines, *(_row('td', row) for row in rows)])}</table>"


def _row(kind: str, texts: Iterable[str]) -> str:
    cells = "".join(f'<{kind} style="text-align:left">{_text(text)}</{kind}>' for text in texts)
    return f"<tr>{cells}</tr>"


def _text(text: str) -> str:
    return escape(shown(text))
