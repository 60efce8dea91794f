"""Sweeps over checkpoints: every new one, once, whatever comes between; and the table they leave."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import clouds
import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import command
from test_checkpoint import problem, torch_bytes

from pipeline import open_hessian
from pipeline.errors import Terminated
from pipeline.runs.checkpoint import read_checkpoint
from pipeline.runs.problem_factory import build_problem
from pipeline.runs.schedule import load_schedule
from pipeline.runs.sweep import list_checkpoints
from pipeline.runs.sweep_table import natural
from pipeline.storage.output import Output

pytestmark = pytest.mark.full("runs sweeps of checkpoints in every emulated cloud")

JOBS = Path(__file__).parents[2] / "jobs"
TILES = 21  # of the network below: P = 330 in chunks of 64
IN_A_BUCKET = f"""
job: {JOBS / "digits_mlp.yaml"}
overrides: [problem_args.hidden=4, problem_args.steps=0, executor=serial, verify=false, chunk=64, 'tile=[1, 1]']
checkpoints: s3://bucket/checkpoints/epoch*
output: s3://bucket/hessians
"""
LOCAL = """
job: job.yaml
checkpoints: checkpoints/**/*.pt
output: out
"""


@pytest.fixture
def s3():
    yield from clouds.started(clouds.moto)


def table(output):
    return pq.read_table(io.BytesIO(output.get("sweep.parquet"))).to_pylist()


def puts(cloud, *within):
    """How often each object was put, of those whose names have all these words."""
    found = (path.split("?")[0] for method, path in cloud.requests if method == "PUT")
    return Counter(path for path in found if all(word in path for word in within))


def test_a_sweep_in_a_bucket_killed_twice(tmp_path, s3):
    """Five epochs of a network trained on digits: each computed once, by three drivers, the first two killed."""
    sys.path.insert(0, str(JOBS))
    try:
        import digits_epochs
    finally:
        sys.path.pop(0)
    digits_epochs.train(tmp_path / "epochs", 4, hidden=4)
    bucket, hessians = Output(f"{s3.url}/checkpoints"), Output(f"{s3.url}/hessians")
    for path in (tmp_path / "epochs").iterdir():
        bucket.put(path.name, path.read_bytes())
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text(IN_A_BUCKET)
    for epoch in (1, 3):  # in which a driver is killed
        words = [sys.executable, "-m", "pipeline", "run-due", str(schedule)]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
            receipts = f"/hessians/epoch{epoch}-", "/receipts/"
            while len(puts(s3, *receipts)) < 3:
                assert driver.poll() is None, driver.communicate()[1]
                time.sleep(0.005)
            if epoch == 1:
                status, _, said = command("run-due", schedule)
                assert status == 75
                assert f"(process {driver.pid}) is at work on it" in said
            driver.kill()
        assert 3 <= len(puts(s3, *receipts)) < TILES
    status, shown, said = command("run-due", schedule)
    assert status == 0, said
    assert "epoch2" not in said
    assert all(word in said for word in ("epoch3", "epoch4", "tiles are there, going on"))
    twice = [path for path, count in puts(s3, "/receipts/").items() if count > 1]
    assert len(twice) <= 2  # the one that was under way at either kill
    assert len(puts(s3, "/receipts/")) == 5 * TILES
    assert set(puts(s3, "/manifest.json").values()) == {1}
    rows = table(hessians)
    assert [row["checkpoint"] for row in rows] == [f"s3://bucket/checkpoints/epoch{k}.safetensors" for k in range(5)]
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)  # it was trained
    s3.requests.clear()
    status, shown, _ = command("run-due", schedule)
    assert status == 0
    assert [word for word in shown.replace("│", "").split() if word.isdigit()] == ["5", "0", "5", "0"]
    assert not [path for method, path in s3.requests if method == "GET" and "/checkpoints/epoch" in path]
    schedule.write_text(f"{IN_A_BUCKET}keep: 2\n")
    assert command("run-due", schedule)[0] == 0
    kept = [row["output"] for row in table(hessians)]
    assert kept == [None, None, None, rows[3]["output"], rows[4]["output"]]
    assert [name for name in hessians.folders() if name.startswith("epoch")] == [
        url.rpartition("/")[2] for url in kept[3:]
    ]
    assert open_hessian(kept[4]).loss == rows[4]["loss"]
    assert [{**row, "output": None} for row in table(hessians)] == [{**row, "output": None} for row in rows]


@pytest.mark.parametrize("server", clouds.CLOUDS)
def test_files_of_each_cloud(server):
    """Are listed in order, with what changes when they do, and read."""
    for cloud in clouds.started(clouds.CLOUDS[server]):
        bucket = Output(f"{cloud.url}/run")
        for name in ("epoch10.pt", "epoch9.pt", "more/epoch1.pt", ".epoch2.pt", "note.txt"):
            bucket.put(name, name.encode())
        first, last = list_checkpoints(f"{bucket.url}/epoch*.pt")
        assert first.url.endswith("/run/epoch9.pt")
        assert read_checkpoint(last.url).data == b"epoch10.pt"
        assert [Path(file.url).name for file in list_checkpoints(f"{bucket.url}/**/*.pt")] == [
            "epoch9.pt",
            "epoch10.pt",
            "epoch1.pt",
        ]
        bucket.put("epoch10.pt", b"EPOCH10.pt")
        assert [file.stamp != "" for file in (first, last)] == [True, True]
        again = list_checkpoints(f"{bucket.url}/epoch*.pt")
        assert [again[0] == first, again[1] == last] == [True, False]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A schedule over local checkpoints, of which there are none yet."""
    (tmp_path / "made.py").write_text("from test_checkpoint import problem as factory\n")
    (tmp_path / "job.yaml").write_text(
        "problem: made.py:factory\nexecutor: serial\ndtype: float64\nchunk: 16\nverify: false\n"
    )
    (tmp_path / "due.yaml").write_text(LOCAL)
    (tmp_path / "checkpoints" / "more").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(seed):
    return torch_bytes(problem(seed).model.state_dict())


def put(name, data):
    Path("checkpoints", name).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def test_the_table(sweep):
    put("a.pt", weights(1))
    status, _, said = command("run-due", "due.yaml")
    assert status == 0, said
    (row,) = table(Output("out"))
    H = open_hessian(row["output"])
    full = H.to_numpy()
    assert (row["parameters"], row["samples"], row["loss"]) == (47, 9, H.loss)
    assert H.manifest.fingerprint.checkpoint == row["sha256"]
    np.testing.assert_allclose(row["trace"], np.trace(full), rtol=1e-12)
    np.testing.assert_allclose(row["norm"], np.linalg.norm(full), rtol=1e-12)
    np.testing.assert_allclose(row["gradient_norm"], np.linalg.norm(H.gradient), rtol=1e-12)
    names = list(H.parameters.names)
    assert [(b["row"], b["col"]) for b in row["blocks"]] == [(a, b) for k, a in enumerate(names) for b in names[k:]]
    for block in row["blocks"]:
        part = full[H.parameters[block["row"]].place, H.parameters[block["col"]].place]
        np.testing.assert_allclose(block["norm"], np.linalg.norm(part), rtol=1e-12, atol=1e-300)
    assert abs(row["finished"].timestamp() - time.time()) < 600
    assert row["worker_seconds"] > 0


def test_some_blocks_only(sweep):
    put("a.pt", weights(1))
    Path("due.yaml").write_text(f"{LOCAL}overrides: ['blocks=[[head.bias, head.bias]]', chunk=4]\n")
    assert command("run-due", "due.yaml")[0] == 0
    (row,) = table(Output("out"))
    assert (row["trace"], row["norm"]) == (None, None)
    assert [(b["row"], b["col"]) for b in row["blocks"]] == [("head.bias", "head.bias")]


def test_what_fails_does_not_stop_the_rest(sweep):
    """Nor what is the same as another, is no checkpoint, or is somebody else's."""
    for name in ("1.pt", "4.pt", "more/1.pt"):
        put(name, weights(int(name[-4])))
    put("2.pt", b"no checkpoint")
    put(".hidden.pt", b"")
    put("note.txt", b"")
    status, _, said = command("run-due", "due.yaml")
    assert status == 1
    assert "checkpoint 1 of 4: " in said
    assert "1 of 4 checkpoints failed" in said.splitlines()[-1]
    assert "2.pt with checkpoint" in said.splitlines()[-1]
    assert [Path(row["checkpoint"]).name for row in table(Output("out"))] == ["1.pt", "4.pt"]
    sha = put("2.pt", weights(2))
    lease = Path("out", f"2-{sha[:12]}", "lease", "00000007.json")
    lease.parent.mkdir(parents=True)
    lease.write_text(json.dumps({"token": "theirs", "host": "elsewhere", "pid": 1, "released": False}))
    put("3.pt", b"no checkpoint")
    status, _, said = command("run-due", "due.yaml")
    assert status == 75  # for the one that another is at work on
    assert "2 of 5 checkpoints failed" in said.splitlines()[-1]
    os.utime(lease, (0, 0))
    put("3.pt", weights(3))
    put("10.pt", weights(10))
    Path("due.yaml").write_text(f"{LOCAL}keep: 2\n")
    status, _, said = command("run-due", "due.yaml")
    assert status == 0, said
    rows = table(Output("out"))
    assert [Path(row["checkpoint"]).name for row in rows] == ["1.pt", "2.pt", "3.pt", "4.pt", "10.pt"]
    assert [row["output"] is None for row in rows] == [True, True, True, False, False]
    assert sorted(Output("out").folders()) == sorted(
        ["lease", "sweep.parquet", *(Path(row["output"]).name for row in rows[3:])]
    )


def test_killed_while_outputs_are_removed(sweep, monkeypatch):
    """The table names none that may be gone."""
    for k in (1, 2, 3):
        put(f"{k}.pt", weights(k))
    assert command("run-due", "due.yaml")[0] == 0
    Path("due.yaml").write_text(f"{LOCAL}keep: 1\n")
    with monkeypatch.context() as killed:
        killed.setattr(Output, "remove", lambda _: (_ for _ in ()).throw(Terminated))
        assert command("run-due", "due.yaml")[0] == 75
    assert [row["output"] is None for row in table(Output("out"))] == [True, True, False]
    assert len(Output("out").folders()) == 5
    assert command("run-due", "due.yaml")[0] == 0
    assert len(Output("out").folders()) == 3


def test_a_renamed_checkpoint_goes_on_with_what_was_begun(sweep):
    data = weights(1)
    begun = Path("out", f"old-{put('old.pt', data)[:12]}")
    assert command("run-due", "due.yaml")[0] == 0
    Path("out", "sweep.parquet").unlink()
    Path("checkpoints", "old.pt").rename("checkpoints/new.pt")
    _, _, said = command("run-due", "due.yaml")
    assert "nothing to do" in said
    (row,) = table(Output("out"))
    assert (Path(row["output"]), Path(row["checkpoint"]).name) == (begun.absolute(), "new.pt")


def test_the_table_of_another_job_is_refused(sweep):
    put("a.pt", weights(1))
    assert command("run-due", "due.yaml")[0] == 0
    Path("due.yaml").write_text(f"{LOCAL}overrides: [dtype=float32]\n")
    status, _, said = command("run-due", "due.yaml")
    assert status == 2
    assert "is of another job: `dtype` was 'float64', got 'float32'" in said
    Path("out", "sweep.parquet").write_bytes(b"damaged")
    assert "sweep.parquet cannot be read" in command("run-due", "due.yaml")[2]


def test_a_job_that_cannot_be_built_is_bad_input(sweep):
    put("a.pt", weights(1))
    Path("made.py").write_text("def factory():\n    raise RuntimeError('no data')\n")
    status, _, said = command("run-due", "due.yaml")
    assert status == 2
    assert "no data" in said


def test_none_yet(sweep):
    status, _, said = command("run-due", "due.yaml")
    assert status == 0
    assert "there is no checkpoint checkpoints/**/*.pt" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("checkpoint: x", "unknown key `checkpoint`; did you mean `checkpoints`"),
        ("keep: 0", "`keep` got 0"),
        ("overrides: [chnk=3]", "unknown key `chnk`; did you mean `chunk`"),
        ("overrides: [checkpoint=a.pt]", "which the schedule due.yaml decides"),
        ("job: nowhere.yaml", "nowhere.yaml: cannot read the job spec"),
        ("output: s3://nowhere/out", "no such bucket or container"),
        ("checkpoints: s3://nowhere/*.pt", "checkpoint s3://nowhere/*.pt: there is no `nowhere`"),
        ("checkpoints: nowhere/*.pt", "checkpoint nowhere/*.pt: there is no `"),
        ("checkpoints: s3://key:secret@bucket/*.pt", "the checkpoint's URL or endpoint_url carries credentials"),
    ],
)
def test_bad_schedules(sweep, s3, text, message):
    kept = [line for line in LOCAL.splitlines() if not line.startswith(text.split(":")[0] + ":")]
    Path("due.yaml").write_text("\n".join([*kept, text]))
    status, _, said = command("run-due", "due.yaml")
    assert status == 2
    assert message in said
    assert len(said.splitlines()) == 1


def test_the_example():
    """Its checkpoints are of the network that its job builds."""
    schedule, job, folder = load_schedule(JOBS / "schedules" / "digits_epochs.yaml")
    assert schedule.checkpoints.startswith("output/digits_epochs/checkpoints/epoch")
    assert build_problem(job.problem, job.problem_args, folder).layout.size == 682


def test_names_are_sorted_by_their_numbers():
    names = ["e10/a.pt", "e2/b.pt", "e2/a10.pt", "e2/a9.pt", "a.pt", "1.pt"]
    assert sorted(names, key=natural) == ["1.pt", "a.pt", "e2/a9.pt", "e2/a10.pt", "e2/b.pt", "e10/a.pt"]
