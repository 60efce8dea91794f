"""What the rest of the pipeline knows of an engine, so that nothing else asks for one by its name.

It lies here and not beside the engines, since plans are cut and times predicted without torch.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Habit:
    """What sizes an engine runs best with, as measured.

    Attributes:
        first_rows: of the first measurement, and
        first_samples: of it; with more its memory grows in proportion.
        most_rows: in a group, on a CPU and on a GPU; beyond, no gain.
        enough_samples: in a micro-batch; groups are made smaller before micro-batches are.
        bytes: held on a CPU and on a GPU; beyond, `jacrev` spends its time in page faults.
    """

    first_rows: int
    first_samples: int
    most_rows: dict[str, int]
    enough_samples: int
    bytes: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class EngineTraits:
    """How an engine works.

    Attributes:
        habit: the sizes it runs best with.
        by_units: whether it treats rows as outputs of a layer, several rows each, and a bias with its weight: it needs
            to know how a parameter is applied, its time goes with entries, and large square tiles suit it. Else each
            row is pulled back through the network as a whole, or less of it, whatever its columns.
        functional: whether it swaps parameters in by torch.func: not where a loss reads them past that.
        on_tensor_cores: whether its products in float32 are made for those of a GPU: `auto` leaves it out, and others
            stand in for it where it is not right.
        by_differences: whether it differentiates nothing twice: for where double backward is wrong or missing alone.
        is_reference: whether it is plain double backward, as what the proof holds others against: differences must
            confirm that.
    """

    habit: Habit
    by_units: bool = False
    functional: bool = False
    on_tensor_cores: bool = False
    by_differences: bool = False
    is_reference: bool = False


_BY_ROWS = Habit(8, 8, {"cpu": 256, "cuda": 256}, 128, {"cpu": 64 * 2**20, "cuda": 2**30})
_FACTORED = EngineTraits(
    habit=Habit(1, 512, {"cpu": 32, "cuda": 128}, 4096, {"cpu": 2**30, "cuda": 2**32}), by_units=True, functional=True
)
TRAITS = {
    "factored": _FACTORED,
    "factored_tf32x3": replace(_FACTORED, on_tensor_cores=True),
    "jacrev": EngineTraits(habit=_BY_ROWS, functional=True),
    "rows": EngineTraits(habit=_BY_ROWS, is_reference=True),
    "differences": EngineTraits(habit=_BY_ROWS, by_differences=True),
}


def candidates(engine: str) -> list[str]:
    """Return the engines that may be taken where one is asked for, or `auto`: fastest first."""
    usual = [name for name, traits in TRAITS.items() if not traits.on_tensor_cores]
    if engine == "auto":
        return usual
    if TRAITS[engine].on_tensor_cores:
        return [engine, *(name for name in usual if not TRAITS[name].by_units)]
    return [engine]
