"""What this machine has for workers: CPUs, GPUs and their memory."""

import os
import platform

import torch

from pipeline.errors import SpecError
from pipeline.planning.memory import SHARE_OF_FREE
from pipeline.planning.placement import Staff, room_for, workers_on_gpu
from pipeline.spec import Settings, device_of


def local_staff(settings: Settings) -> Staff:
    """Return the workers of a run on this machine."""
    count = worker_count(settings)
    return Staff(count, count)


def worker_count(settings: Settings) -> int:
    """Return the number of workers: as set, or this machine's CPUs and GPUs shared out."""
    if settings.executor == "serial":
        if settings.resources or settings.label_selector:
            raise SpecError(
                "`resources` and `label_selector` choose nodes of a cluster, but executor=serial computes in this "
                "process: use executor=ray"
            )
        if settings.workers not in {None, 1}:
            raise SpecError(
                f"`workers` got {settings.workers} with executor=serial, which computes in this process: "
                "use executor=ray"
            )
        return 1
    if settings.workers is not None:
        return settings.workers
    by_cpu = len(os.sched_getaffinity(0)) // settings.cpus_per_worker
    if settings.gpus_per_worker > 0:
        return max(1, min(by_cpu, room_for("GPU", torch.cuda.device_count(), settings.gpus_per_worker)))
    return max(1, by_cpu)


def require_device(device: str) -> None:
    """Refuse to compute on a device that is not here.

    Args:
        device: "cuda" or "cpu".

    Raises:
        SpecError: a GPU is wanted where torch finds none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SpecError(
            f"`device` is cuda, but torch {torch.__version__} finds no CUDA device on {platform.node()}: compute where "
            "there is one (`address` names a cluster), or give device=cpu"
        )


def device_name(device: str) -> str:
    """Name a device for people."""
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def allowed_device_bytes(settings: Settings) -> int | None:
    """Return what one worker may hold on its GPU: of the whole, shared with the others on it; None on a CPU."""
    if device_of(settings) == "cpu":
        return None
    _, total = torch.cuda.mem_get_info()
    return int(SHARE_OF_FREE * total / workers_on_gpu(settings.gpus_per_worker or 1))
