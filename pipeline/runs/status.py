"""How far a run is, asked from any machine that can read its output."""

import time
from typing import Any, Literal

from pipeline.planning.manifest import Manifest
from pipeline.runs.lease import LEASE_SECONDS, read_lease
from pipeline.storage.output import RECEIPTS, SUCCESS, VERIFY, Output, has_failed, is_proof
from pipeline.storage.receipts import object_sizes
from pipeline.storage.run_files import read_manifest

State = Literal["running", "interrupted", "finished", "unproven", "absent"]


def status(url: str, endpoint_url: str | None = None) -> dict[str, Any]:
    """Say how far the run in an output is.

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


def _state(output: Output, stored: dict[str, Any], lease: dict[str, Any] | None) -> State:
    """Sum up."""
    if lease and _is_working(lease):
        return "running"
    if stored.get("verified"):
        return "finished" if stored["finished"] else "interrupted"
    return "unproven" if stored.get("finished") or has_failed(output.get(VERIFY)) else "interrupted"


def _is_working(lease: dict[str, Any]) -> bool:
    return not lease.get("released") and lease["silent"] is not None and lease["silent"] < LEASE_SECONDS


def _stored(output: Output, manifest: Manifest) -> dict[str, Any]:
    """Say what is there."""
    receipts, verified = output.sizes(RECEIPTS), output.get(VERIFY)
    tiles = manifest.plan.tiles()
    return {
        "P": manifest.layout.size,
        "tiles": len(tiles),
        "done": sum(f"{tile.id}.json" in receipts for tile in tiles),
        "bytes": sum(object_sizes(output).values()),
        "finished": output.get(SUCCESS) is not None,
        "verified": None if verified is None else is_proof(verified),
    }


def _told(lease: dict[str, Any]) -> dict[str, Any]:
    """Say what the driver last told."""
    state = lease.get("state", {})
    done, seconds = state.get("done", 0), state.get("seconds", 0.0)
    rate = done / seconds if done else None
    left = state.get("tiles", 0) - state.get("before", 0) - done - len(state.get("set_aside", {}))
    working = _is_working(lease)
    return {
        "failed": len(state.get("set_aside", {})),
        "tiles per second": None if rate is None else round(rate, 3),
        "seconds left": round(left / rate) if working and rate else None,
        "workers": state.get("workers", 0) if working else 0,
        "repeated": ", ".join(f"{count} {loss}" for loss, count in state.get("lost", {}).items()) or 0,
        "last errors": "\n".join(state.get("errors", [])) or None,
        "lease": _holder(lease, working=working),
    }


def _holder(lease: dict[str, Any], *, working: bool) -> str:
    """Say who holds the lease."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(lease.get("since", 0)))
    who = f"{lease.get('host', 'somebody')}, process {lease.get('pid', '?')}, since {since}"
    if lease.get("released"):
        return f"given back by {who}"
    return f"{who}, heard {lease['silent']:.0f} s ago" + ("" if working else ": it has ended")
