"""The table of hostile data: of each kind, what was tried and what came of it, from all processes that run tests.

    python -m pytest tests/hostile -m "not long" -n0 --hostile-table tests/benchmarks/results/hostile.md

What is tried is right, or refused in one line; all else fails its test.
"""

from collections import Counter
from pathlib import Path

PROPERTY = "hostile"  # of a test's report, which travels from xdist's workers
KINDS = {
    "test_stored_objects": "stored: {}",
    "test_what_a_line_says": "stored: what a line says",
    "test_specs": "specs",
    "test_overrides": "overrides of specs",
    "test_what_is_no_file": "what is no file",
    "test_factories": "factories",
    "test_checkpoints": "checkpoints",
    "test_tables": "tables of sweeps",
    "test_a_factory_that_raises": "factories that raise with a secret",
    "test_a_broken_spec": "broken specs with a secret",
}
HEADS = "kind", "tried", "right", "one line", "else", "worst, s", "worst, MiB"


class HostileTable:
    """Collects rows from reports, and writes them at the end.

    Args:
        path: of the page.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: dict[str, Counter[str]] = {}
        self._worst: dict[str, tuple[float, int]] = {}
        self._secrets = 0

    def pytest_runtest_logreport(self, report) -> None:
        self._secrets += report.when == "call" and report.passed and "test_secrets.py" in report.nodeid
        if report.when != "teardown":  # what a test's fixture tells is known by then
            return
        for name, row in report.user_properties:
            if name == PROPERTY:
                kind = row["kind"]
                self._counts.setdefault(kind, Counter()).update(row["counts"])
                seconds, size = self._worst.get(kind, (0.0, 0))
                self._worst[kind] = max(seconds, row["seconds"]), max(size, row["bytes"])

    def pytest_sessionfinish(self) -> None:
        lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
        for kind, counts in sorted(self._counts.items()):
            seconds, size = self._worst[kind]
            came = counts["answer"], counts["one line"], counts["fault"]
            cells = kind, counts.total(), *came, f"{seconds:.2f}", f"{size / 2**20:.0f}"
            lines.append(f"| {' | '.join(map(str, cells))} |")
        all_of = sum(self._counts.values(), Counter())
        told = f"{all_of.total()} attempts: {all_of['answer']} right, {all_of['one line']} refused in one line, "
        told += f"{all_of['fault']} else."
        secrets = f"{self._secrets} tests planted secrets and found none in what is printed, logged, stored or sent."
        self._path.write_text("\n".join([told, secrets, "", *lines]) + "\n")


def kind_of(request) -> str:
    """Name what a test tries."""
    named = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    kind = KINDS.get(request.node.originalname, request.node.originalname)
    return kind.format(named.get("kind", "mutations"))
