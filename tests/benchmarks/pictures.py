"""The pictures of the README and of the bundled jobs, made anew by `hessian report`.

    python tests/benchmarks/pictures.py [JOB ...] [--results FOLDER]

Computes each job in this process, and keeps one picture of its report: JOB.png.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from pipeline.analysis.report.write import PARTS, write_report
from pipeline.progress.bar import ConsoleReporter
from pipeline.runs.api import run_job
from pipeline.spec import load_job

JOBS = Path(__file__).parents[2] / "jobs"
# Of each job: the part of its report, and the picture in it.
PICTURES = {
    "char_transformer": ("blocks", "block_norms"),
    "digits_mlp": ("entries", "entries"),
    "digits_cnn": ("layers", "layers"),
}


def draw(job, results, console):
    """Compute a job's Hessian, and keep its picture."""
    part, picture = PICTURES[job]
    reporter = ConsoleReporter(console)
    with tempfile.TemporaryDirectory() as folder:
        spec = load_job(JOBS / f"{job}.yaml", ("executor=serial",), f"{folder}/out")
        hessian = run_job(spec, JOBS, reporter).hessian
        write_report(hessian, without=PARTS.keys() - {part}, report=reporter)
        shutil.copy(f"{folder}/out/report/{picture}.png", results / f"{job}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="*", metavar="JOB", default=list(PICTURES), help=", ".join(PICTURES))
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    if unknown := set(arguments.jobs) - PICTURES.keys():
        parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(PICTURES)}")
    for job in arguments.jobs:
        draw(job, arguments.results, Console(stderr=True))


if __name__ == "__main__":
    main()
