"""What goes away by itself when talking to a store, and trying again until it does.

fsspec's filesystems give up after seconds; a bucket may throttle for minutes. Nothing is lost by a repeated request:
objects are put whole, by one writer.
"""

import logging
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from tenacity import RetryCallState, retry, retry_if_exception, stop_after_delay, wait_random_exponential

PATIENCE_SECONDS = 300
LONGEST_WAIT_SECONDS = 20
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_CLIENTS = frozenset(
    {"aiobotocore", "aiohttp", "azure", "botocore"}
)  # whose own errors without a status are of transport
_FINAL = (
    "NoCredentials",
    "PartialCredentials",
    "ClientAuthentication",
    "InvalidURL",
    "ParamValidation",
    "UnknownEndpoint",
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def http_status(error: BaseException) -> int | None:
    """Give the HTTP status behind an exception of any of the clouds' clients; None where there is none."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # gcsfs, azure, aiohttp
            status = next(
                (getattr(cause, name) for name in ("code", "status_code", "status") if hasattr(cause, name)), None
            )
        if str(status).isdigit():
            return int(str(status))
    return None


def is_transient(error: BaseException) -> bool:
    """Say whether a request that failed may succeed later: throttling, a server in trouble, a cut connection."""
    status = http_status(error)
    if status is not None:
        return status in _TRANSIENT
    if any(isinstance(cause, (FileNotFoundError, PermissionError)) for cause in _causes(error)):
        return False
    return any(isinstance(cause, (ConnectionError, TimeoutError)) or _of_transport(cause) for cause in _causes(error))


def _of_transport(error: BaseException) -> bool:
    kind = type(error)
    return kind.__module__.split(".")[0] in _CLIENTS and not any(name in kind.__name__ for name in _FINAL)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Give an exception and all that led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _note(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    _log.warning("attempt %d failed with %s, trying again", state.attempt_number, type(error).__name__)


def patient(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Have a function, or a coroutine function, tried again while what it raises is transient.

    Waits grow exponentially, at random up to `LONGEST_WAIT_SECONDS`, so that many workers do not return at once.

    Args:
        function: idempotent.

    Returns:
        The function; after `PATIENCE_SECONDS` it raises the last error.
    """
    decorated: Callable[Arguments, Result] = retry(
        retry=retry_if_exception(is_transient),
        stop=stop_after_delay(PATIENCE_SECONDS),
        wait=wait_random_exponential(multiplier=0.2, max=LONGEST_WAIT_SECONDS),
        before_sleep=_note,
        reraise=True,
    )(function)
    return decorated
