"""What is tried again, and what is not: the clients' own exceptions."""

import asyncio
import socket
from threading import Event

import aiohttp
import pytest
import requests
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ServiceRequestError
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ProfileNotFound
from gcsfs.retry import HttpError
from s3fs.errors import translate_boto_error

from pipeline.storage import retries
from pipeline.storage.retries import http_status, is_transient, patient


def s3(code, status):
    answer = {"Error": {"Code": code, "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(answer, "PutObject"))


def azure(status):
    error = HttpResponseError("refused")
    error.status_code = status
    return error


def after(first, then):
    then.__context__ = first
    return then


TRANSIENT = [
    s3("SlowDown", 503),
    s3("InternalError", 500),
    s3("RequestTimeout", 400),
    s3("OperationAborted", 409),
    HttpError({"code": 429, "message": "slow down"}),
    requests.exceptions.ProxyError(),
    azure(503),
    ServiceRequestError("cut"),
    EndpointConnectionError(endpoint_url="http://127.0.0.1"),
    aiohttp.ServerDisconnectedError(),
    TimeoutError(),
    socket.gaierror(-2, "Name or service not known"),
    after(FileNotFoundError(), ConnectionResetError()),
]
FINAL = [
    s3("AccessDenied", 403),
    s3("NoSuchBucket", 404),
    s3("InvalidBucketName", 400),
    HttpError({"code": 403, "message": "no"}),
    azure(404),
    ClientAuthenticationError("no"),
    NoCredentialsError(),
    ProfileNotFound(profile="typo"),
    FileNotFoundError(),
    PermissionError(),
    ValueError("a fault of ours"),
    OSError(28, "No space left on device"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_transient(error):
    assert is_transient(error)


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_final(error):
    assert not is_transient(error)


def test_statuses():
    assert http_status(s3("SlowDown", 503)) == 503
    assert http_status(azure(404)) == 404
    assert http_status(HttpError({"code": 429, "message": ""})) == 429
    assert http_status(ValueError()) is None


def refused():
    raise ConnectionResetError("while it is tried")


async def refused_later():
    refused()


@pytest.mark.parametrize("call", [patient, lambda *arguments: lambda: asyncio.run(patient(*arguments)())])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_is_given_up_is_not_tried_again(monkeypatch, call, when):
    """Whoever waits for the next attempt, with a thread or a coroutine, is woken."""
    monkeypatch.setattr(retries, "LONGEST_WAIT_SECONDS", 0)
    given_up = Event()
    attempts = []
    function = refused if call is patient else refused_later

    def noted(state):
        attempts.append(state.attempt_number)
        given_up.set()

    monkeypatch.setattr(retries, "_note", noted)
    if when == "before":
        given_up.set()
    with pytest.raises(ConnectionResetError):
        call(function, given_up)()
    assert len(attempts) == (0 if when == "before" else 1)


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_each_attempt_is_one_call(monkeypatch, failures):
    """The first one is made without tenacity, and counts."""
    monkeypatch.setattr(retries, "LONGEST_WAIT_SECONDS", 0)
    noted, calls = [], []
    monkeypatch.setattr(retries, "_note", lambda state: noted.append(state.attempt_number))

    def function(value, *, more):
        calls.append(value + more)
        if len(calls) <= failures:
            refused()
        return calls[-1]

    assert patient(function)(1, more=2) == 3
    assert calls == [3] * (failures + 1)
    assert noted == list(range(1, failures + 1))
