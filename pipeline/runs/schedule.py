"""The schedule: what a YAML file for `hessian run-due` may say."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import SpecError
from pipeline.spec import Count, JobSpec, Place, load_job, parse, read_mapping


class ScheduleSpec(BaseModel):
    """Which checkpoints to compute the Hessian of, again and again as there are new ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    job: str = Field(
        description="Job spec, a path relative to the schedule; without a checkpoint, its output is not used."
    )
    checkpoints: Place = Field(description="Paths or fsspec URLs of checkpoints, with `*`, `?` and `**` as in a shell.")
    output: Place = Field(description="Path or fsspec URL below which each Hessian has a folder, and the table lies.")
    keep: Count | None = Field(None, description="Hessians to keep, the last by name; all when not given.")
    overrides: list[str] = Field([], description="Keys of the job spec to replace, each as `key=value`.")


def load_schedule(path: Path) -> tuple[ScheduleSpec, JobSpec, Path]:
    """Read a schedule and its job.

    Args:
        path: the YAML file.

    Returns:
        The schedule, the job, and the folder that the job spec lies in.

    Raises:
        SpecError: either is not valid, or the job says what the schedule decides.
    """
    schedule = parse(ScheduleSpec, read_mapping(path, "schedule", "checkpoints"), str(path))
    place = path.parent / schedule.job
    job = load_job(place, schedule.overrides)
    if job.checkpoint is not None:
        raise SpecError(f"{place}: `checkpoint` got {job.checkpoint}, which the schedule {path} decides: leave it out")
    return schedule, job.model_copy(update={"output": None}), place.parent
