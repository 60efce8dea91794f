"""A page as HTML: one file, which asks for nothing else, and in which names are text whatever they are."""

import base64
import hashlib
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pipeline.analysis.pictures.canvas import require_matplotlib
from pipeline.analysis.report.parts import Page, Part
from pipeline.errors import SpecError, nearest, shown
from pipeline.progress import Reporter
from pipeline.storage.output import REPORT, Output

if TYPE_CHECKING:
    from jinja2 import Template

PAGE = "index.html"

Draw = Callable[[Any], Part]


def require_drawing() -> None:
    """Refuse before anything is read.

    Raises:
        SpecError: matplotlib or jinja2 is not installed.
    """
    require_matplotlib()
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise SpecError("jinja2 is not installed: python3 -m pip install matplotlib jinja2") from None


def chosen_parts(parts: Mapping[str, Draw], without: Collection[str]) -> dict[str, Draw]:
    """Choose what is drawn, and refuse before anything is read what cannot be.

    Args:
        parts: all of them.
        without: names of those to leave out.

    Returns:
        The others.

    Raises:
        SpecError: there is no such part, or matplotlib or jinja2 is not installed.
    """
    for name in without:
        if name not in parts:
            raise SpecError(f"got a part `{name}` to leave out{nearest(name, list(parts))}")
    require_drawing()
    return {name: part for name, part in parts.items() if name not in without}


def drawn(parts: Mapping[str, Draw], of: Any, report: Reporter) -> list[Part]:
    """Draw parts, one after the other.

    Args:
        parts: by name.
        of: what each is given.
        report: told about progress.

    Returns:
        The parts.
    """
    found = []
    for number, (name, part) in enumerate(parts.items(), 1):
        report.say(f"part {number} of {len(parts)}: {name}")
        found.append(part(of))
    return found


def put_page(output: Output, page: Page, folder: str = REPORT, name: str = PAGE) -> str:
    """Put a page and its pictures into an output.

    Args:
        output: where to.
        page: it.
        folder: in the output.
        name: of the page's file.

    Returns:
        The page's URL.

    Raises:
        OutputError: they cannot be written.
    """
    for picture in page.pictures:
        output.put(f"{folder}/{picture.name}.svg", picture.svg)
        output.put(f"{folder}/{picture.name}.png", picture.png)
    output.put(f"{folder}/{name}", as_html(page).encode())
    return f"{output.url}/{folder}/{name}"


def as_html(page: Page) -> str:
    """Write a page."""
    template, script, style = _template(), _data("page.js"), _data("page.css")
    # The browser itself holds the page to what it is: no request, and no script but this one.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_sha256(script)}'"
    return template.render(page=page, script=script, style=style, policy=policy)


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline.analysis.report", "."),
        autoescape=True,
        finalize=_text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("page.html.jinja")


def _text(value: Any) -> Any:
    """Hide secrets of URLs, and write escapes for what no screen should act on; what is markup already stays."""
    return shown(value, keep="\n") if type(value) is str else value


def _data_uri(data: bytes, kind: str) -> str:
    """Return data as a URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _data(name: str) -> str:
    return (files("pipeline.analysis.report") / name).read_text()


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
