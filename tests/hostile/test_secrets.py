"""Secrets planted wherever a URL or an argument is taken: none is printed, logged, pickled or stored."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from attempts import refusal
from commands import command

from pipeline.cluster.job_package import pack
from pipeline.errors import SpecError
from pipeline.spec import load_job
from pipeline.storage.filesystems import reason
from pipeline.urls import Url, is_secret_name, redacted, redacted_values

SECRET = "xK9-planted"
URLS = [
    f"{scheme}://{place}"
    for scheme in ("http", "https", "ftp", "sftp", "smb", "foo", "s3", "gs")
    for place in (
        f"user:{SECRET}@127.0.0.1:9/out",
        f"user:a/{SECRET}@127.0.0.1:9/out",
        f"user:a@{SECRET}@127.0.0.1:9/out",
        f"{SECRET}@127.0.0.1:9/out",
        f"127.0.0.1:9/out?X-Amz-Signature={SECRET}",
        f"127.0.0.1:9/out?a=1&sig={SECRET}#b",
        f"127.0.0.1:9/out#token={SECRET}",
    )
]
URLS += [f"foo:user:{SECRET}@127.0.0.1/out", f"abfs://user:{SECRET}@account.dfs.core.windows.net/out"]
URLS += [f"zip://a::http://user:{SECRET}@127.0.0.1:9/out", f"HTTP://127.0.0.1:9/out?{SECRET}"]
PLAIN = [
    "/home/a@b:c/out?d#e",
    "file:///home/a@b/out?d#e",
    "memory://a#b",
    "s3://bucket/run#3",
    "gs://bucket/a@b",
    "abfs://container@account.dfs.core.windows.net/out",
    "http://127.0.0.1:8265",
    "out",
]
FACTORY = """
import torch
from torch import nn
from pipeline import Problem

def made(token, where=None, more=None):
    assert token == "{SECRET}", "not resolved"
    x = torch.ones(3, 2, dtype=torch.float64)
    return Problem(nn.Linear(2, 1).double(), nn.MSELoss(), (x, x[:, :1]))

def raises(**given):
    raise RuntimeError(f"refused: {given}")
""".replace("{SECRET}", SECRET)


@pytest.mark.parametrize("url", URLS)
def test_a_url(url):
    held = Url(url)
    assert held.plain == url
    shown = [str(held), repr(held), f"{held}", json.dumps(held), redacted(f"no answer from {url}: it is away")]
    shown += [pickle.dumps(held).decode("latin1"), held.hidden_in(f"GET /out?{url.partition('?')[2]}"), Url(held)]
    shown += [redacted_values({"a": [url]})["a"][0], repr(pickle.loads(pickle.dumps(held)).plain)]
    assert not [text for text in shown if SECRET in text]
    assert Url(held).plain == url


@pytest.mark.parametrize("url", PLAIN)
def test_a_url_without_secrets(url):
    assert Url(url) == url
    assert not Url(url).is_secret
    assert redacted(f"output {url}: is away") == f"output {url}: is away"


def test_names_of_secrets():
    for name in ("token", "api_key", "API-Key", "apiKey", "hf_token", "db.password", "secret_key", "authToken", "auth"):
        assert is_secret_name(name), name
    for name in ("max_tokens", "tokens", "author", "key", "keys", "tokenizer", "passes", "width", 3):
        assert not is_secret_name(name), name


def test_what_a_client_says():
    url = Url(f"http://user:{SECRET}@host/a?sig=q%2Br{SECRET}")
    error = OSError(
        f"Max retries exceeded with url: /a?sig=q%2Br{SECRET} (user='user', password={SECRET!r}, q+r{SECRET})"
    )
    assert SECRET not in url.hidden_in(reason(error))


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made.py").write_text(FACTORY.replace(SECRET, '" + __import__("os").environ["PLANTED"] + "'))
    monkeypatch.setenv("PLANTED", SECRET)
    return tmp_path


def spec(folder, **more):
    path = folder / "job.yaml"
    path.write_text(json.dumps({"problem": "made.py:made", "executor": "serial"} | more))
    return path


@pytest.mark.parametrize("key", ["output", "checkpoint", "endpoint_url", "address"])
def test_urls_of_a_spec(job, key):
    """Whatever becomes of it: the command's word, the spec itself, and what it says of other kinds of values."""
    for url in URLS[:: 1 if key == "output" else 5]:
        path = spec(job, problem_args={"token": "${PLANTED}"}, **{key: url})
        held = load_job(path)
        assert SECRET not in held.model_dump_json() + repr(held) + pickle.dumps(held).decode("latin1")
        assert getattr(held, key).plain == url
        if key in ("output", "endpoint_url"):
            status, out, err = command("run", path, *(("--output", "s3://bucket/out") if key == "endpoint_url" else ()))
            assert status == 2
            assert "carries credentials" in err or "chains" in err or "client is not installed" in err, err
            assert SECRET not in out + err
        spec(job, **{key: [url]})
        with pytest.raises(SpecError) as refused:
            load_job(path)
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize("url", [url for url in URLS if url.startswith(("http:", "foo", "s3"))])
def test_commands(job, url):
    for arguments in (
        ("status", url),
        ("verify", url),
        ("export", url, "--format", "npy", "x.npy"),
        ("run", spec(job, problem_args={"token": "${PLANTED}"}), "--set", f"checkpoint={url}", "--output", "out"),
        ("run", spec(job), "--set", f"problem_args.token={url}[", "--output", "out"),
    ):
        status, out, err = command(*arguments)
        assert status in (1, 2, 75)
        assert SECRET not in out + err, arguments


def test_every_byte_of_a_sweep(job):
    """Run, log and table, with secrets in arguments; a token that is another one is no other job."""
    from safetensors.torch import save_file
    from torch import ones

    save_file({"weight": ones(1, 2).double(), "bias": ones(1).double()}, job / "1.safetensors")
    given = {"token": "${PLANTED}", "where": f"http://user:{SECRET}@host/a", "more": {"api_key": SECRET}}
    spec(job, problem_args=given)
    due = job / "due.yaml"
    due.write_text("job: job.yaml\ncheckpoints: '*.safetensors'\noutput: out\n")
    status, out, err = command("run-due", due, "--log", "log.json")
    assert status == 0, err
    spec(job, problem_args=given | {"more": {"api_key": "another"}})
    assert command("run-due", due)[0] == 0
    status, more, errors = command("run", job / "job.yaml", "--output", "other", "--log", "log.json")
    assert status == 0, errors
    written = [path for folder in ("out", "other") for path in Path(folder).rglob("*") if path.is_file()]
    assert len(written) > 10
    leaks = [path for path in (*written, Path("log.json")) if SECRET.encode() in path.read_bytes()]
    assert not leaks
    assert SECRET not in out + err + more + errors


def test_a_factory_that_raises(job, attempts):
    """Its word repeats what it was given."""
    given = {"token": SECRET, "plain": 3, "where": f"http://user:{SECRET}@host/a", "more": {"password": SECRET}}
    path = spec(job, problem="made.py:raises", problem_args=given)
    status, out, err = command("run", path, "--output", "out")
    assert status == 2
    assert SECRET not in out + err
    assert "token='***', plain=3" in err
    path = spec(job, problem="made.py:raises", problem_args={"a": "${PLANTED}", "b": "${NOWHERE_AT_ALL}"})
    assert "NOWHERE_AT_ALL, which is not set" in command("run", path, "--output", "out")[2]
    path = spec(job, problem="made.py:raises", problem_args={"a": "${PLANTED}"})
    code = "import sys; from pathlib import Path; from pipeline.runs.api import *; from pipeline.spec import load_job\n"
    code += "load_problem(load_job(sys.argv[1]), Path(sys.argv[1]).parent)"
    said = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=os.environ)
    assert "refused: {'a': '***'}" in said.stderr
    assert SECRET not in said.stdout + said.stderr


def test_what_is_sent_to_a_cluster(job):
    for more in ({"checkpoint": URLS[0]}, {"problem_args": {"token": SECRET}}, {"problem_args": {"a": [URLS[0]]}}):
        with pytest.raises(SpecError, match=r"the cluster would keep") as refused:
            pack(spec(job, output="s3://bucket/out", **more))
        assert SECRET not in str(refused.value)
    parcel = pack(spec(job, output="s3://bucket/out", problem_args={"token": "${PLANTED}"}))
    assert SECRET.encode() not in b"".join(parcel.files.values())
    assert b"${PLANTED}" in parcel.files["job.yaml"]


def test_a_broken_spec(attempts, tmp_path):
    """What is shown of a file is where, not what."""
    path = tmp_path / "job.yaml"
    for text in (f"problem_args: {{token: {SECRET}", f"token: {SECRET}: b", f"problem_args: {SECRET}", f"- {SECRET}"):
        path.write_text(text)
        assert SECRET not in refusal(attempts.make("spec", path=str(path)), 2)
