"""URLs that may carry secrets: user and password, a signature in the query, a token in the fragment.

A `Url` is text in which each of these is `***`: so it is printed, compared, pickled and stored. What it stands for is
asked for by name, where it is opened.
"""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
LOCAL = frozenset({"file", "local", "memory"})  # whose paths may hold any character
AZURE = frozenset({"az", "abfs", "abfss"})  # where a container stands before the @
KEYS = frozenset({"s3", "s3a", "gs", "gcs"}) | AZURE  # where # is a character of an object's name like any other

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?:(//)|(?=[^/\s]*@))")
_WITHIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:[^\s'\"`<>]+")
_SECRET_NAME = re.compile(
    r"(^|[^a-z])(pass(word|wd|phrase)|secret|token|credentials?|auth(orization)?|signature|api[_-]?key|access[_-]?key|"
    r"private[_-]?key)($|[^a-z])"
)
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")  # of the environment, in a problem's arguments
_LEAST = 3  # characters of what is hidden wherever it stands


class Url(str):
    """A URL or a path, without the secrets in it.

    Args:
        text: with them.
    """

    def __new__(cls, text: str) -> "Url":
        """Take a URL."""
        self = super().__new__(cls, "::".join(map(_redacted, text.split("::"))))
        self._plain = text.plain if isinstance(text, Url) else str(text)
        return self

    _plain: str

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel without them."""
        return type(self), (str(self),)

    @property
    def plain(self) -> str:
        """The URL with its secrets, to open it."""
        return self._plain

    @property
    def is_secret(self) -> bool:
        """Whether there are any in it."""
        return self._plain != str(self)

    def hidden_in(self, text: str) -> str:
        """Take its secrets out of what others say.

        Args:
            text: that may repeat them.

        Returns:
            The text without them.
        """
        return without(text, self.secrets())

    def secrets(self) -> set[str]:
        """Return what is hidden, as it stands and decoded, whole and in parts."""
        if not self.is_secret:
            return set()
        user = self._plain.partition("://")[2].rpartition("@")[0] or self._plain.rpartition("@")[0].partition(":")[2]
        tail = re.split(r"[?#]", self._plain, maxsplit=1)[1:]
        parts = {user, *user.split(":"), *tail, *(value for part in tail for value in re.split(r"[&=#?]", part))}
        return parts | set(map(unquote, parts))


def redacted(text: str) -> str:
    """Hide secrets of the URLs in a text.

    Args:
        text: any.

    Returns:
        The text, the same where there are none.
    """
    return _WITHIN.sub(lambda found: str(Url(found[0])), text) if ":" in text else text


def without(text: str, secrets: set[str]) -> str:
    """Hide secrets wherever they stand in a text; the shortest ones are left, as they are in every word."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _LEAST:
            text = text.replace(secret, HIDDEN)
    return text


def is_secret_name(name: object) -> bool:
    """Whether what goes by a name should be told to nobody."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", str(name)).lower()
    return _SECRET_NAME.search(words) is not None


def redacted_values(value: Any, name: object = "") -> Any:
    """Hide what goes by secret names, and secrets in URLs, at any depth of plain data.

    Args:
        value: mappings, lists and plain values.
        name: that it goes by.

    Returns:
        The same without them.
    """
    if isinstance(value, Mapping):
        return {key: redacted_values(inner, key) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(inner, name) for inner in value]
    if is_secret_name(name) and value is not None:
        return HIDDEN
    return redacted(value) if isinstance(value, str) else value


def _redacted(url: str) -> str:
    """Hide user and password, query and fragment of one URL."""
    found = _SCHEME.match(url)
    if found is None or (scheme := found[1].lower()) in LOCAL:
        return url
    rest = url[found.end() :]
    cut = re.search(r"\?|#.*=" if scheme in KEYS else r"[?#]", rest, re.DOTALL)
    rest, tail = (rest[: cut.start()], rest[cut.start()] + HIDDEN) if cut else (rest, "")
    user = rest.partition("@")[0]
    if "@" in rest and (":" in user or ("/" not in user and scheme not in AZURE)):
        rest = f"{HIDDEN}@{rest.rpartition('@')[2]}"
    return found[0] + rest + tail
