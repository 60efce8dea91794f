"""Which nodes of a cluster hold workers, and how many: what a worker takes against what the nodes have."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import SpecError
from pipeline.spec import Settings

ACCELERATOR = "ray.io/accelerator-type"  # the label by which Ray tells GPUs apart
NODE = "ray.io/node-id"
UNSAID = ("memory", "object_store_memory", "node:", "accelerator_type:")  # resources that every node names


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        id: Ray's name for it.
        resources: amounts by name, in all, whether free or not.
        labels: values by name.
    """

    id: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    def __str__(self) -> str:
        """Return what it has in words, without what every node has."""
        amounts = {name: amount for name, amount in self.resources.items() if not name.startswith(UNSAID)}
        return _listed(amounts, {name: value for name, value in self.labels.items() if name != NODE}) or "nothing"


@dataclass(frozen=True)
class Share:
    """What a worker takes of a node.

    Attributes:
        resources: amounts by name.
        labels: that the node must have, in Ray's notation: `a`, `!a`, `in(a, b)`, `!in(a, b)`.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @classmethod
    def of(cls, settings: Settings) -> "Share":
        """Read it from settings."""
        amounts = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker, **(settings.resources or {})}
        return cls({name: amount for name, amount in amounts.items() if amount}, settings.label_selector or {})

    def __str__(self) -> str:
        """Return it in words."""
        return _listed(self.resources, self.labels)

    def room(self, node: Node) -> int:
        """Return the number of workers that a node holds."""
        if not all(_selects(wanted, node.labels.get(label)) for label, wanted in self.labels.items()):
            return 0
        return min(room_for(name, node.resources.get(name, 0), amount) for name, amount in self.resources.items())


@dataclass(frozen=True)
class Staff:
    """The workers of a run.

    Attributes:
        workers: in all.
        beside: most of them that share a machine.
    """

    workers: int
    beside: int


def names_cluster(settings: Settings) -> bool:
    """Whether a Ray that runs elsewhere is to be joined."""
    return settings.address is not None or "RAY_ADDRESS" in os.environ


def asks_for_workers(settings: Settings) -> bool:
    """Whether settings speak of workers: how many, what each takes, or where they are."""
    asked = settings.workers, settings.gpus_per_worker, settings.resources, settings.label_selector
    return any(asked) or names_cluster(settings)


def workers_on_gpu(gpus_per_worker: float) -> int:
    """Return how many workers of so much of a GPU share one: none is spread over two."""
    return int(1 / gpus_per_worker + 1e-9)


def staff_of(nodes: Sequence[Node], settings: Settings) -> Staff:
    """Return the workers that a cluster is to have.

    Args:
        nodes: of the cluster as it is.
        settings: what workers take, and how many if that is said.

    Returns:
        As many as are asked for, or as there is room for.

    Raises:
        SpecError: neither says how many.
    """
    room = [Share.of(settings).room(node) for node in nodes]
    workers = settings.workers or sum(room)
    if not workers:
        raise SpecError(f"`workers` is not given, and {no_room(nodes, settings)}: say how many the cluster is to add")
    return Staff(workers, min(workers, max(room, default=0) or workers))


def one_of_each_kind(nodes: Sequence[Node], settings: Settings) -> list[Node]:
    """Return, for each type of accelerator that workers may be on, the node of least memory."""
    share = Share.of(settings)
    kinds: dict[str, Node] = {}
    for node in sorted(nodes, key=lambda node: node.resources.get("memory", 0)):
        if share.room(node):
            kinds.setdefault(node.labels.get(ACCELERATOR, ""), node)
    return list(kinds.values())


def no_room(nodes: Sequence[Node], settings: Settings) -> str:
    """Return the error that no node holds a worker: what it takes, and what the nodes have."""
    counts = Counter(map(str, nodes))
    have = "; ".join(f"{count} with {node}" if count > 1 else f"one with {node}" for node, count in counts.items())
    return f"no node has room for a worker, which takes {Share.of(settings)} (nodes: {have or 'none'})"


def room_for(name: str, has: float, amount: float) -> int:
    """Return how often an amount of a resource fits; no worker is spread over two GPUs.

    Args:
        name: of the resource.
        has: what there is of it.
        amount: what a worker takes.

    Returns:
        The number.
    """
    if name == "GPU" and amount < 1:
        return int(has) * workers_on_gpu(amount)
    return int(has / amount + 1e-9)


def _selects(wanted: str, value: str | None) -> bool:
    """Whether a label's value is one that is wanted."""
    positive = wanted.removeprefix("!")
    values = positive[3:-1].split(",") if positive.startswith("in(") else [positive]
    return (value in [each.strip() for each in values]) == (positive == wanted)


def _listed(amounts: Mapping[str, float], labels: Mapping[str, str]) -> str:
    return ", ".join(
        [f"{name} {amount:g}" for name, amount in sorted(amounts.items())]
        + [f"{name}: {value}" for name, value in sorted(labels.items())]
    )
