"""What becomes of each kind of problem that people bring: right, refused in one line, or worse.

    python tests/benchmarks/kinds.py [--label after] [--only REGEX] [--results FOLDER]

Every ingredient of `tests/hazards/` that has a kind, judged as the tests judge it, each in a process of its own, which
it may end. Columns of `kinds.md` are labels: another tree's are kept (`PYTHONPATH` names the tree).
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import re
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from hazards import HAZARDS
from hazards.test_hazards import assert_justified, assert_right_as_written, judged, outcome

RESULTS = Path(__file__).parent / "results"
WORST = 8  # messages shown of a kind


def judge(name):
    """Return the verdict on an ingredient and, where it was refused or worse, what was said."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    hazard = HAZARDS[name]()
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            found = outcome(hazard, "cpu")
        except Exception as error:
            return "raised", first_line(f"{type(error).__name__}: {error}")
        if not isinstance(found, Exception):
            return on_a_matrix(name, *found)
        try:
            assert_justified(str(found), hazard, judged(hazard))
        except AssertionError:
            return "refused falsely", str(found)
        return "refused", str(found)


def on_a_matrix(name, found, engines):
    try:
        assert_right_as_written(name, found, engines)
    except AssertionError as error:
        return "wrong", first_line(str(error))
    return "right", ""


def first_line(message):
    return message.partition("\n")[0][:300]


def apart(name):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(judge, name).result()
        except BrokenProcessPool:
            return "died", "the process ended"


def table(results):
    """Return a row for each kind, and below it what was said where one was refused or worse."""
    kinds = list(dict.fromkeys(make.kind for make in HAZARDS.values() if make.kind))
    columns = "".join(f" {label} |" for label in results)
    lines = [f"| kind | members |{columns}", "|---" * (2 + len(results)) + "|"]
    for kind in kinds:
        members = [name for name, make in HAZARDS.items() if make.kind == kind]
        cells = [counts(found, members) for found in results.values()]
        lines.append(f"| {kind} | {len(members)} | {' | '.join(cells)} |")
    latest = list(results.values())[-1]
    for kind in kinds:
        said = {n: latest[n] for n, make in HAZARDS.items() if make.kind == kind and n in latest}
        said = {name: found for name, found in said.items() if found[0] != "right"}
        lines += ["", f"## {kind}", ""] if said else []
        lines += [f"- {name}: {verdict}. {text(message)}" for name, (verdict, message) in list(said.items())[:WORST]]
        lines += [f"- and {len(said) - WORST} more, in kinds.json"] if len(said) > WORST else []
    return "\n".join(lines) + "\n"


def counts(found, members):
    return ", ".join(
        f"{n} {verdict}" for verdict, n in Counter(found[m][0] for m in members if m in found).most_common()
    )


def text(message):
    return message.replace("|", "/").replace("<", "&lt;")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--label", default="after")
    parser.add_argument("--only", default="")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    path = chosen.results / "kinds.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    own = results.pop(chosen.label, {})
    for name, make in HAZARDS.items():
        if make.kind and re.search(chosen.only, name):
            own[name] = apart(name)
            print(name, *own[name], sep=" | ", flush=True)
    results[chosen.label] = own  # the last
    path.write_text(json.dumps(results, indent=1) + "\n")
    (chosen.results / "kinds.md").write_text(table(results))
    if bad := [name for name, found in own.items() if found[0] not in {"right", "refused"}]:
        sys.exit(f"neither right nor rightly refused: {bad}")


if __name__ == "__main__":
    main()
