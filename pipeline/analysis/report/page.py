"""A page as HTML: one file, which asks for nothing else, and in which names are text whatever they are."""

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from pipeline.analysis.report.parts import Page
from pipeline.errors import SpecError, shown
from pipeline.storage.output import REPORT, Output

if TYPE_CHECKING:
    from jinja2 import Template

PAGE = "index.html"


def require_jinja() -> None:
    """Refuse before anything is read.

    Raises:
        SpecError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise SpecError("jinja2 is not installed: python3 -m pip install matplotlib jinja2") from None


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
    """Give data as a URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _data(name: str) -> str:
    return (files("pipeline.analysis.report") / name).read_text()


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
