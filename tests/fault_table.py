"""The table of faults: a row for each test that uses the fixture `faults`, from all processes that run tests."""

import json
from pathlib import Path

PROPERTY = "fault"  # of a test's report, which travels from xdist's workers


class FaultTable:
    """Collects rows from reports, and writes them at the end.

    Args:
        path: of the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, object]] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" and not report.skipped:
            rows = [row for name, row in report.user_properties if name == PROPERTY]
            self._rows += [{**row, "survived": report.passed} for row in rows]

    def pytest_sessionfinish(self) -> None:
        rows = sorted(self._rows, key=lambda row: (str(row.get("fault")), str(row.get("where")), str(row["test"])))
        survived = sum(bool(row["survived"]) for row in rows)
        self._path.write_text(json.dumps({"survived": survived, "tried": len(rows), "rows": rows}, indent=1) + "\n")
