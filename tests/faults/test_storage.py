"""Storage that goes wrong: whatever happens, the run ends, or goes on later, with the bits of an undisturbed one."""

import re
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from proxy import call, cut_before, cut_in_body, delay, in_turn, kill_sender, lose_answer, refuse, stale
from runs import finish_times, undisturbed

from pipeline.errors import StoppedError, TileError
from pipeline.progress import Reporter
from pipeline.runs.lease import Lease
from pipeline.runs.status import status
from pipeline.storage.output import Output

pytestmark = pytest.mark.full("waits for a store that stays away")

CHUNK_PUT = {"method": "PUT", "path": "/hessian.zarr/c/"}
TRANSIENT = {
    "burst of 503": (refuse(503, "SlowDown"), CHUNK_PUT, 6),
    "burst of 500": (refuse(500, "InternalError"), {"method": "PUT", "path": "/hessian.parquet/"}, 6),
    "slow answers": (delay(0.1), {"method": "PUT"}, 30),
    "connection cut before a put": (cut_before, CHUNK_PUT, 4),
    "connection cut in mid-put": (cut_in_body, CHUNK_PUT, 4),
    "connection cut in mid-receipt": (cut_in_body, {"method": "PUT", "path": "/receipts/"}, 4),
    "lost answer": (lose_answer, {"method": "PUT", "path": "/(hessian|receipts)"}, 8),
    "503 while reading back": (refuse(503, "SlowDown"), {"method": "GET", "path": "/hessian.zarr/c/"}, 6),
    "connection cut while listing": (cut_before, {"method": "GET", "path": "list-type"}, 3),
}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_goes_away_is_waited_out(proxy, url, faults, fault):
    """No tile is computed twice, and nothing is left half."""
    known = undisturbed("parquet")
    known.planned(url)
    action, which, times = TRANSIENT[fault]
    rule = proxy.rule(action, times=times, **which)
    outcome = known.run(url)
    assert rule.done == times
    assert outcome.computed == known.tiles
    assert outcome.verification.ok
    assert Output(url).sizes("hessian.parquet").keys() == {
        name.removeprefix("hessian.parquet/") for name in known.objects if name.startswith("hessian.parquet/")
    }
    faults(fault, "S3", times=times, recomputed=0, tiles=known.tiles, equal=known.equals(outcome))


REFUSALS = {
    "permission lost": (refuse(403, "AccessDenied"), "access denied"),
    "bucket gone for a while": (refuse(404, "NoSuchBucket"), "no such bucket"),
}


def test_who_ends_in_trouble_does_not_wait_for_the_store(proxy, url, monkeypatch):
    """Nor does what becomes of the lease hide the trouble."""
    monkeypatch.setattr("pipeline.runs.lease.BEAT_SECONDS", 0.05)
    begun = []

    def run_into_trouble():
        with Lease(Output(url), dict):
            rule = proxy.rule(refuse(503, "SlowDown"), method="PUT", path="/lease/")
            until(lambda: rule.done)
            begun.append(time.monotonic())
            raise RuntimeError("why the run ends")

    with pytest.raises(RuntimeError, match="why the run ends"):
        run_into_trouble()
    assert time.monotonic() - begun[0] < 10


@pytest.mark.parametrize("executor", ["serial", pytest.param("ray", marks=pytest.mark.long)])
@pytest.mark.parametrize("fault", REFUSALS)
def test_what_stays_stops_the_run_at_once(proxy, url, faults, fault, executor):
    known = undisturbed("zarr").on(executor)
    output = known.planned(url)
    action, words = REFUSALS[fault]
    rule = proxy.rule(action, method="PUT", path="/(hessian|receipts)", after=9)
    with pytest.raises(StoppedError, match=words) as stopped:
        known.run(url)
    assert stopped.value.exit_code == 75
    assert "run the same command again to go on" in str(stopped.value)
    assert "\n" not in str(stopped.value)
    proxy.clear()
    kept = finish_times(output)
    outcome = known.run(url)
    assert outcome.computed == known.tiles - len(kept)
    assert finish_times(output).items() >= kept.items()
    faults(fault, f"S3, {executor}", times=rule.done, recomputed=0, tiles=known.tiles, equal=known.equals(outcome))


def test_a_worker_dies_between_a_chunk_and_its_mirror(proxy, url, faults):
    """SIGKILL, once the chunk is stored and before anything else can be."""
    known = undisturbed("zarr").on("ray")
    known.planned(url)
    killed = {"/c/0/1$": "/c/1/0$", "/c/1/3$": "/c/3/1$"}
    for chunk in killed:
        proxy.rule(kill_sender, method="PUT", path=chunk, times=1)
    outcome = known.run(url)
    puts = [request.path for request in proxy.requests if request.method == "PUT"]
    for chunk, mirror in killed.items():
        of_both = [bool(re.search(mirror, path)) for path in puts if re.search(f"{chunk}|{mirror}", path)]
        assert of_both == [False, False, True]
    repeated = outcome.lost["died"]
    assert len(killed) <= repeated <= 3 * len(killed)  # the one being written, the one computed, the one waiting
    assert outcome.computed == known.tiles
    assert outcome.verification.ok
    faults(
        "worker killed between a chunk and its mirror",
        "S3, ray",
        times=len(killed),
        recomputed=repeated,
        tiles=known.tiles,
        equal=known.equals(outcome),
    )


def test_a_tile_whose_receipt_is_never_answered(proxy, url, faults):
    """It hangs in the last call, which has no tile of its own, and is set aside all the same."""
    known = undisturbed("zarr").on("ray")
    settings = known.settings.model_copy(update={"tile_deadline": 3.0, "workers": 1})
    known = replace(known, settings=settings)
    known.planned(url)
    proxy.rule(delay(3600), method="PUT", path="/receipts/r3-4_c3-4.json")
    with pytest.raises(TileError, match=r"1 tile failed each time .* no answer for 3 s"):
        known.run(url)
    proxy.clear()
    outcome = undisturbed("zarr").run(url)
    assert outcome.computed == 1
    faults("receipt never answered", "S3, ray", times=3, recomputed=3, tiles=known.tiles, equal=known.equals(outcome))


def test_nothing_waits_for_what_is_lost_anyway(proxy, url, faults):
    """One chunk of a tile is refused for good; another, refused for a while, would be tried for five minutes."""
    known = undisturbed("one tile")
    known.planned(url)
    waiting = proxy.rule(refuse(503, "SlowDown"), method="PUT", path="/c/0/0$")
    proxy.rule(in_turn(call(lambda _: until(lambda: waiting.done)), refuse(403, "AccessDenied")), path="/c/0/1$")
    start = time.monotonic()
    with pytest.raises(StoppedError, match="access denied"):
        known.run(url)
    assert time.monotonic() - start < 100
    proxy.clear()
    outcome = known.run(url)
    faults(
        "permission lost while others wait", "S3", times=1, recomputed=0, tiles=known.tiles, equal=known.equals(outcome)
    )


def until(condition):
    while not condition():
        time.sleep(0.01)


def test_the_command_says_so_in_one_line(proxy, hessian, url, faults):
    known = undisturbed("zarr")
    output = known.planned(url)
    rule = proxy.rule(refuse(403, "AccessDenied"), after=12, **CHUNK_PUT)
    found = hessian("run", "job.yaml", "--output", url)
    assert found.returncode == 75, found.stderr
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert errors == found.stderr.splitlines()[-1:]
    assert "access denied" in errors[0]
    kept = finish_times(output)
    assert f"of {known.tiles} tiles done, which are kept" in errors[0]
    proxy.clear()
    found = hessian("run", "job.yaml", "--output", url)
    assert found.returncode == 0, found.stderr
    assert f"{len(kept)} of {known.tiles} tiles are there, going on" in found.stderr
    outcome = known.run(url)
    faults(
        "permission lost", "S3, command", times=rule.done, recomputed=0, tiles=known.tiles, equal=known.equals(outcome)
    )


def test_a_refusal_before_the_first_tile_is_bad_input(proxy, hessian, url):
    undisturbed("zarr").planned(url)
    proxy.rule(refuse(403, "AccessDenied"), method="PUT")
    assert hessian("run", "job.yaml", "--output", url).returncode == 2


def test_bucket_removed(proxy, hessian, url, faults):
    """With all that was in it: the same command starts anew once there is a bucket again."""
    known = undisturbed("zarr")
    known.planned(url)
    bucket = boto3.resource("s3", endpoint_url=proxy.server.endpoint).Bucket("bucket")

    def remove(_):
        bucket.objects.all().delete()
        bucket.delete()

    proxy.rule(call(remove), after=5, times=1, **CHUNK_PUT)
    found = hessian("run", "job.yaml", "--output", url)
    bucket.create()
    assert found.returncode == 75, found.stderr
    assert "no such bucket" in found.stderr.splitlines()[-1]
    lost = int(re.search(r"stopped with (\d+) of", found.stderr)[1])
    again = hessian("run", "job.yaml", "--output", url)
    assert again.returncode == 0, again.stderr
    outcome = known.run(url)
    assert outcome.computed == 0
    faults("bucket removed", "S3, command", times=1, recomputed=lost, tiles=known.tiles, equal=known.equals(outcome))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with room for the run."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


class FillsTheDisk(Reporter):
    """Somebody else's file takes all room, once some tiles are done."""

    def __init__(self, file: Path, tiles: int) -> None:
        self._file, self._tiles = file, tiles

    def advance(self, tile_bytes: int) -> None:
        self._tiles -= 1
        if self._tiles == 0:
            with self._file.open("wb", buffering=0) as file, suppress(OSError):  # until there is no more
                while True:
                    file.write(bytes(4096))


@pytest.mark.parametrize("shape", ["zarr", "parquet"])
def test_disk_full(small_disk, faults, shape):
    known = undisturbed(shape)
    output = known.planned(str(small_disk / "out"))
    filler = small_disk / "filler"
    with pytest.raises(StoppedError, match=r"no room, No space left on device: make some\); stopped with") as stopped:
        known.run(output.url, report=FillsTheDisk(filler, 3))
    assert stopped.value.exit_code == 75
    filler.unlink()
    kept = finish_times(output)
    assert len(kept) >= 3
    outcome = known.run(output.url)
    assert outcome.computed == known.tiles - len(kept)
    assert finish_times(output).items() >= kept.items()
    faults("disk full", f"disk, {shape}", times=1, recomputed=0, tiles=known.tiles, equal=known.equals(outcome))


# Not of leases: one that is hidden is refused by the conditional put.
STALE = "^(?!.*lease).*list-type"


def test_a_stale_listing_that_hides_tiles(proxy, url, faults):
    """What it hides is computed again, and no more."""
    known = undisturbed("zarr")
    known.planned(url)
    refusal = proxy.rule(refuse(403, "AccessDenied"), after=9, **CHUNK_PUT)
    with pytest.raises(StoppedError):
        known.run(url)
    proxy.rules.remove(refusal)
    proxy.rule(stale(), method="GET", path=STALE)
    hidden = known.tiles - status(url)["done"]
    assert 0 < hidden < known.tiles
    assert known.run(url).computed == hidden
    outcome = known.run(url)
    assert outcome.computed == hidden
    faults("stale listing hides", "S3", times=1, recomputed=hidden, tiles=known.tiles, equal=known.equals(outcome))


def test_a_stale_listing_that_shows_what_is_gone(proxy, url, faults):
    known = undisturbed("zarr")
    output = known.finished(url)
    proxy.rule(stale(), method="GET", path=STALE)
    assert known.run(url).computed == 0
    output.delete("hessian.zarr/c/2/1")
    assert known.run(url).computed == 0
    outcome = known.run(url, check=True)
    assert outcome.computed == 1
    faults("stale listing shows", "S3", times=1, recomputed=1, tiles=known.tiles, equal=known.equals(outcome))


@pytest.mark.parametrize("place", ["S3", "disk"])
def test_what_a_killed_writer_leaves_is_ignored(request, faults, place, tmp_path):
    known = undisturbed("parquet")
    output = known.finished(str(tmp_path / "out") if place == "disk" else request.getfixturevalue("url"))
    folders = ["hessian.zarr/c/0", "receipts", "hessian.parquet/row_chunk=0/col_chunk=1", "hessian.parquet"]
    for folder in folders:
        output.put(f"{folder}/.chunk.parquet.0123.partial", b"half of someth")
        output.put(f"{folder}/1.4567.partial", b"")
    outcome = known.run(output.url, check=True)
    assert outcome.computed == 0
    faults(
        "leftover partial files",
        place,
        times=2 * len(folders),
        recomputed=0,
        tiles=known.tiles,
        equal=known.equals(outcome),
    )


def test_small_shapes(proxy, url, faults):
    """P smaller than a chunk: one tile, one chunk, cut in the middle of its only put."""
    known = undisturbed("one chunk")
    assert known.tiles == 1
    known.planned(url)
    proxy.rule(cut_in_body, times=2, **CHUNK_PUT)
    outcome = known.run(url)
    assert outcome.computed == 1
    faults("connection cut in mid-put", "S3, one chunk", times=2, recomputed=0, tiles=1, equal=known.equals(outcome))
