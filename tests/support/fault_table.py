"""The table of faults: a row for each test that uses the fixture `faults`, from all processes that run tests.

    python -m pytest tests/faults --fault-table FAULTS.json
    python tests/support/fault_table.py FAULTS.json [MORE.json ...]

The second joins such files, of a test that is in several the last row, and writes `benchmarks/results/faults.json` and
`faults.md`. What README says is held against them by `faults/test_table.py`.
"""

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

PROPERTY = "fault"  # of a test's report, which travels from xdist's workers
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GROUPS = {
    "test_workers": "Workers and nodes",
    "test_host_memory": "Workers and nodes",
    "test_driver": "Drivers",
    "test_hosts": "The network",
    "test_storage": "The store",
    "test_damage": "What is stored already",
}
Row = dict[str, object]


class FaultTable:
    """Collects rows from reports, and writes them at the end.

    Args:
        path: of the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Row] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" and not report.skipped:
            rows = [row for name, row in report.user_properties if name == PROPERTY]
            self._rows += [{**row, "survived": report.passed} for row in rows]

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(text(self._rows))


def text(rows: Sequence[Row]) -> str:
    """Write rows as JSON, in an order of their own."""
    rows = sorted(rows, key=lambda row: (str(row.get("fault")), str(row.get("where")), str(row["test"])))
    survived = sum(bool(row["survived"]) for row in rows)
    return json.dumps({"survived": survived, "tried": len(rows), "rows": rows}, indent=1) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """Lay rows out with a line for each group."""
    lines = ["| what went wrong | trials | faults | tiles recomputed, of | equal |", "|---|---|---|---|---|"]
    for title, group in groupby(sorted(rows, key=_place), lambda row: _place(row)[1]):
        lines.append(_line(title, list(group)))
    return "\n".join(lines) + "\n"


def markdown(rows: Sequence[Row]) -> str:
    """Lay rows out with a line for each fault, after the summary."""
    survived = sum(bool(row["survived"]) for row in rows)
    lines = [
        f"{survived} of {len(rows)} trials survived: the matrix was that of an undisturbed run, bit for bit (after a "
        "device ran out of memory: to 1e-14). Recomputed: tiles that were given out again, or were damaged, of all "
        "tiles of those trials.",
        "",
        summary(rows),
    ]
    for title, group in groupby(sorted(rows, key=_place), lambda row: _place(row)[1]):
        lines += [f"## {title}", "", "| fault | trials | faults | tiles recomputed, of | equal | where |"]
        lines.append("|---|---|---|---|---|---|")
        for fault, same in groupby(group, lambda row: str(row.get("fault"))):
            trials = list(same)
            places = ", ".join(sorted({str(row.get("where")) for row in trials}))
            lines.append(f"{_line(fault, trials)} {places} |")
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def _place(row: Row) -> tuple[int, str, str]:
    """Sort by group, then by fault."""
    title = GROUPS[Path(str(row["test"]).split("::")[0]).stem]
    return list(GROUPS.values()).index(title), title, str(row.get("fault"))


def _line(what: str, rows: Sequence[Row]) -> str:
    times, again, tiles = (_sum(rows, name) for name in ("times", "recomputed", "tiles"))
    equal = "yes" if all(row.get("equal") and row["survived"] for row in rows) else "NO"
    return f"| {what} | {len(rows)} | {times:,} | {again:,} of {tiles:,} | {equal} |"


def _sum(rows: Sequence[Row], name: str) -> int:
    return sum(row.get(name, 0) for row in rows)


def main() -> None:
    found = [row for path in sys.argv[1:] for row in json.loads(Path(path).read_text())["rows"]]
    rows = list({row["test"]: row for row in found}.values())
    if not rows:
        sys.exit(__doc__)
    (RESULTS / "faults.json").write_text(text(rows))
    (RESULTS / "faults.md").write_text(markdown(rows))
    print(f"{sum(bool(row['survived']) for row in rows)} of {len(rows)} survived")


if __name__ == "__main__":
    main()
