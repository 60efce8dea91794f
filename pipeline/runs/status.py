"""How far a run is, asked from any machine that can read its output."""

from typing import Any, Literal

from pipeline.planning.manifest import Manifest
from pipeline.runs.holder import Held
from pipeline.runs.lease import read_lease
from pipeline.storage.output import RECEIPTS, VERIFY, Output
from pipeline.storage.receipts import object_sizes
from pipeline.storage.run_files import is_finished, read_manifest, read_proof

State = Literal["running", "interrupted", "finished", "unproven", "absent"]


def status(url: str, endpoint_url: str | None = None) -> dict[str, Any]:
    """Return how far the run in an output is.

    Args:
        url: the output.
        endpoint_url: of its server, where it is not the cloud's own.

    Returns:
        The state: "running" while a driver gives signs of life, "interrupted" where the same job would go on,
        "finished", proof included, "unproven" where all is computed and the proof failed or was switched off, or
        "absent". Of a run, tiles done and in all, bytes stored, whether finished and verified; and what its driver last
        told: tiles that failed too often, tiles a second, seconds left, workers that are up, tiles that had to be
        repeated, the last errors, and who holds the lease.

    Raises:
        OutputError: the output does not answer, or there is no such bucket.
    """
    output = Output(url, endpoint_url)
    output.check_readable()
    manifest, lease = read_manifest(output), read_lease(output)
    if manifest is None and lease is None:
        return {"state": "absent"}
    stored = _stored(output, manifest) if manifest else {"planned": False}
    return {"state": _state(output, stored, lease)} | stored | (_told(lease) if lease else {})


def _state(output: Output, stored: dict[str, Any], lease: Held | None) -> State:
    """Sum up."""
    if lease and lease.is_live:
        return "running"
    if stored.get("verified"):
        return "finished" if stored["finished"] else "interrupted"
    return "unproven" if stored.get("finished") or read_proof(output) is False else "interrupted"


def _stored(output: Output, manifest: Manifest) -> dict[str, Any]:
    """Return what is there."""
    receipts = output.sizes(RECEIPTS)
    tiles = manifest.plan.tiles()
    return {
        "P": manifest.layout.size,
        "tiles": len(tiles),
        "done": sum(f"{tile.id}.json" in receipts for tile in tiles),
        "bytes": sum(object_sizes(output).values()),
        "finished": is_finished(output),
        # One that cannot be understood proves nothing.
        "verified": None if output.age(VERIFY, ask=False) is None else read_proof(output) is True,
    }


def _told(lease: Held) -> dict[str, Any]:
    """Return what the driver last told."""
    state, working = lease.holder.state, lease.is_live
    rate = state.done / state.seconds if state.done and state.seconds else None
    left = state.tiles - state.before - state.done - len(state.set_aside)
    return {
        "failed": len(state.set_aside),
        "tiles per second": None if rate is None else round(rate, 3),
        "seconds left": round(left / rate) if working and rate else None,
        "workers": state.workers if working else 0,
        "repeated": ", ".join(f"{count} {loss}" for loss, count in state.lost.items()) or 0,
        "last errors": "\n".join(state.errors) or None,
        "lease": _holder(lease),
    }


def _holder(lease: Held) -> str:
    """Return who holds the lease."""
    holder = lease.holder
    who = f"{holder.host}, {holder.process}, since {holder.moment}"
    if holder.released:
        return f"given back by {who}"
    heard = "gone" if lease.silent is None else f"heard {lease.silent:.0f} s ago"
    return f"{who}, {heard}" + ("" if lease.is_live else ": it has ended")
