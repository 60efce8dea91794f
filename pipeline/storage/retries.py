"""What goes away by itself when talking to a store, and trying again until it does.

fsspec's filesystems give up after seconds; a bucket may throttle for minutes. Nothing is lost by a repeated request:
objects are put whole, by one writer.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from functools import wraps
from socket import gaierror
from threading import Event
from typing import Any, ParamSpec, TypeVar

from tenacity import RetryCallState, retry, retry_if_exception, wait_random_exponential
from tenacity.nap import sleep_using_event

PATIENCE_SECONDS = 300
LONGEST_WAIT_SECONDS = 20
_GLANCE_SECONDS = 0.1  # between looks, from a coroutine, at whether waiting has become pointless
_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_S3_CODES = frozenset({"InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"})
_CLIENTS = frozenset({"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "urllib3"})
# Of these clients: what went wrong on the way. Their other errors without a status are of configuration or credentials.
_ON_THE_WAY = frozenset({
    "ChecksumError", "ClientConnectionError", "ClientPayloadError", "ConnectionError", "HTTPClientError",
    "IncompleteReadError", "RequestException", "ResponseStreamingError", "ServiceRequestError", "ServiceResponseError",
    "TransportError",
})  # fmt: skip

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status behind an exception of any of the clouds' clients; None where there is none."""
    for cause in _causes(error):
        status = _botocore(cause, "ResponseMetadata", "HTTPStatusCode")
        for name in ("status_code", "status", "code"):  # azure, aiohttp, gcsfs
            status = getattr(cause, name, None) if status is None else status
        if str(status).isdigit():
            return int(str(status))
    return None


def is_transient(error: BaseException) -> bool:
    """Whether a request that failed may succeed later: throttling, a server in trouble, a cut connection."""
    causes = list(_causes(error))
    if any(_botocore(cause, "Error", "Code") in _S3_CODES for cause in causes):
        return True
    status = http_status(error)
    if status is not None:
        return status in _STATUSES
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    return any(isinstance(cause, (ConnectionError, TimeoutError, gaierror)) or _on_the_way(cause) for cause in causes)


def _botocore(error: BaseException, part: str, name: str) -> Any:
    response = getattr(error, "response", None)
    return response.get(part, {}).get(name) if isinstance(response, dict) else None


def _on_the_way(error: BaseException) -> bool:
    return getattr(error, "retryable", False) is True or any(
        kind.__module__.split(".")[0] in _CLIENTS and kind.__name__ in _ON_THE_WAY for kind in type(error).__mro__
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and all that led to it."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _at_an_end(state: RetryCallState) -> bool:
    return (state.seconds_since_start or 0) >= PATIENCE_SECONDS


def _note(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    _log.warning("attempt %d failed with %s, trying again", state.attempt_number, type(error).__name__)


def _pause(function: Callable[..., Any], given_up: Event) -> Callable[[float], Any]:
    """Return the way to wait between attempts, which ends at once when they are given up."""
    if not inspect.iscoroutinefunction(function):
        return sleep_using_event(given_up)

    async def pause(seconds: float) -> None:
        end = time.monotonic() + seconds
        while not given_up.is_set() and (left := end - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _GLANCE_SECONDS))

    return pause


def patient(function: Callable[Arguments, Result], given_up: Event | None = None) -> Callable[Arguments, Result]:
    """Have a function, or a coroutine function, tried again while what it raises is transient.

    Waits grow exponentially, at random up to `LONGEST_WAIT_SECONDS`, so that many workers do not return at once.

    Args:
        function: idempotent.
        given_up: once set, nothing is tried again.

    Returns:
        The function; after `PATIENCE_SECONDS`, or when it is given up, it raises the last error.
    """
    given_up = given_up or Event()

    def retried(call: Callable[..., Any]) -> Callable[..., Any]:
        made: Callable[..., Any] = retry(
            retry=retry_if_exception(is_transient),
            stop=lambda state: given_up.is_set() or _at_an_end(state),
            wait=wait_random_exponential(multiplier=0.2, max=LONGEST_WAIT_SECONDS),
            sleep=_pause(function, given_up),
            before_sleep=_note,
            reraise=True,
        )(call)
        return made

    if inspect.iscoroutinefunction(function):
        return retried(function)

    @wraps(function)
    def tried(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:  # what succeeds at once, as nearly all does, does not pay for tenacity: as much as for reading a chunk
            return function(*args, **kwargs)
        except Exception as error:
            failures = [error]

        def again() -> Result:
            if failures:
                raise failures.pop()
            return function(*args, **kwargs)

        result: Result = retried(again)()
        return result

    return tried
