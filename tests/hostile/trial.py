"""A process in which attempts are made on stored objects, specs and checkpoints, each in a fork with limits of its own.

It reads one attempt a line from standard input, as JSON, and answers each in one line: what came of it, the seconds it
took and the bytes it needed. An attempt may end in an answer, or in one error of ours in one line; all else is a fault.
"""

import json
import os
import resource
import select
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

MOST_BYTES = 2**30  # beyond what the process has when it begins
MOST_SECONDS = 10.0


def _attempt(order):
    """What came of it: `answer` or `one line`, with the answer or the line."""
    from pipeline.errors import HessianError

    try:
        return "answer", DEEDS[order["deed"]](order)
    except HessianError as error:
        line = str(error)
        if "\n" in line or "Traceback" in line or len(line) > 2000 or not line.isprintable():
            return "fault", f"not one line: {line!r}"
        # Of the user's own code, what it raised is kept behind the line.
        if order["deed"] == "factory":
            return "one line", f"{error.exit_code} {line}"
        if error.__cause__ is not None or (error.__context__ is not None and not error.__suppress_context__):
            return "fault", f"chained noise behind {line!r}: {error.__cause__ or error.__context__!r}"
        return "one line", f"{error.exit_code} {line}"


def _look(order):
    """Ask for how far the run is, and for the whole matrix."""
    from pipeline.analysis.hessian import open_hessian
    from pipeline.console.tables import show_status
    from pipeline.runs.status import status

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        show_status(status(order["url"]))
    H = open_hessian(order["url"])
    return [H.to_numpy().tolist(), H.gradient.tolist()]


def _prove(order):
    """Read back everything."""
    from pipeline.results.verify import verify_hessian

    return verify_hessian(order["url"]).ok


def _audit(order):
    from pipeline.results.receipt_audit import audit_output

    return not any(audited.faults for audited in audit_output(order["url"]))


def _summarize(order):
    from pipeline.analysis.hessian import open_hessian
    from pipeline.analysis.summary import summarize

    return summarize(open_hessian(order["url"])).trace


def _hold(order):
    """Take the lease of an output and give it back."""
    from pipeline.runs.lease import Lease
    from pipeline.storage.output import Output

    with Lease(Output(order["url"]), dict):
        return True


def _table(order):
    from pipeline.runs.sweep_table import Sweep
    from pipeline.storage.output import Output

    return sorted(Sweep.read(Output(order["url"]), order["job"]).rows)


def _spec(order):
    from pipeline.spec import load_job

    return load_job(order["path"], order.get("set", ())).model_dump_json()[:1000]


def _schedule(order):
    from pipeline.runs.schedule import load_schedule

    return load_schedule(Path(order["path"]))[0].model_dump_json()[:1000]


def _weights(order):
    from pipeline.runs.checkpoint import read_checkpoint

    return sorted(read_checkpoint(order["path"]).tensors(order.get("key")))


def _factory(order):
    """Build the problem of a spec."""
    from pipeline.runs.api import load_problem
    from pipeline.spec import load_job

    path = Path(order["path"])
    return type(load_problem(load_job(path), path.parent)).__name__


DEEDS = {
    "look": _look,
    "prove": _prove,
    "audit": _audit,
    "summarize": _summarize,
    "hold": _hold,
    "table": _table,
    "spec": _spec,
    "schedule": _schedule,
    "weights": _weights,
    "factory": _factory,
}


def _limited(order, pipe):
    """Make an attempt inside limits, and write what came of it."""
    own_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own_bytes + MOST_BYTES,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        kind, said = _attempt(order)
    except BaseException as error:
        kind, said = "fault", f"{type(error).__name__}: {str(error)[:300]}"
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    os.write(pipe, json.dumps({"kind": kind, "said": said, "bytes": max(grown, 0)}).encode())


def _forked(order):
    """Make an attempt in a fork."""
    start = time.monotonic()
    here, there = os.pipe()
    child = os.fork()
    if not child:
        os.close(here)
        try:
            _limited(order, there)
        finally:
            os._exit(0)
    os.close(there)
    parts, left = [], MOST_SECONDS
    while left > 0 and select.select([here], [], [], left)[0]:
        part = os.read(here, 2**16)
        if not part:
            break
        parts.append(part)
        left = MOST_SECONDS - (time.monotonic() - start)
    os.close(here)
    seconds = time.monotonic() - start
    if seconds >= MOST_SECONDS:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    found = json.loads(b"".join(parts) or b"{}")
    return {"kind": "fault", "said": f"no answer, status {status}", "bytes": 0} | found | {"seconds": seconds}


def main():
    import pipeline.console.tables  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
