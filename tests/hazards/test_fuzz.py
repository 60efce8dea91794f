"""Problems composed at random: right or refused, whatever the composition."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings

from hazards.fuzz import Composition, compositions, judge

pytestmark = pytest.mark.filterwarnings("ignore")  # ingredients are there to be odd: torch warns of many
FEW, MANY = 60, 2000


def judged(most, examples=()):
    """Verdicts on the examples and on others; a failure does not end it, nor is it made smaller."""
    found = []

    def collect(c):
        found.append((c, judge(c)))

    for c in examples:
        collect = example(c)(collect)
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=most, derandomize=True, phases=(Phase.explicit, Phase.generate), **options)(
        given(compositions())(collect)
    )()
    return found


def report(found):
    """Print counts by reason; give those that are wrong or raised."""
    for reason, count in Counter(
        str(verdict) if verdict.kind != "wrong" else "wrong" for _, verdict in found
    ).most_common():
        print(f"{count:5d} {reason}")
    return [f"{verdict}\n    {c!r}" for c, verdict in found if verdict.kind in {"wrong", "raised"}]


NARROW = Composition(
    layers=("linear",),
    way="closure",
    features=(4, -3, 0, 2),
    dtype="float32",
    separable=False,
    microbatch=3,
    seed=8,
)
EXAMPLES = (  # that were wrong, or refused after all the work, or are of forms seldom drawn
    NARROW,
    Composition(
        layers=("linear",),
        loss="huber",
        way="closure",
        features=(0, 0, 0, -6),
        weights=2,
        dtype="float32",
        reduction="sum",
        seed=7,
    ),
    Composition(
        front="sequence",
        layers=("lstm", "attention"),
        wrapper="checkpointed",
        loss="weighted classes",
        weights=6,
        fitted=False,
        dtype="float32",
        params="*weight*",
        l2=1e-06,
        seed=7,
    ),
    Composition(
        front="tokens",
        layers=("attention", "attention"),
        loss="huber",
        features=(5, 5, 5, 5),
        weights=-6,
        fitted=False,
        dtype="float32",
        microbatch=7,
        l2=1e-06,
        reduction="sum",
    ),
    Composition(
        front="sequence",
        layers=("linear",),
        loss="weighted classes",
        features=(6, 0, 0, -6),
        weights=6,
        fitted=False,
        reduction="sum",
        seed=3,
    ),
    Composition(
        front="sequence",
        layers=("linear",),
        wrapper="frozen",
        loss="huber",
        features=(6, 0, 0, -6),
        weights=6,
        fitted=False,
        microbatch=3,
        l2=0.3,
    ),
    Composition(
        layers=("residual", "attention"),
        wrapper="checkpointed",
        loss="weighted classes",
        way="pair",
        features=(6, 0, 0, -6),
        separable=False,
        l2=0.3,
        reduction="sum",
        seed=9,
    ),
    replace(NARROW, layers=("linear", "linear"), loss="huber"),
    replace(NARROW, layers=("conv",), wrapper="scripted", loss="smoothed", form="three parts"),
    Composition(
        layers=("tanh",), wrapper="parallel", loss="ce", way="closure", form="flags", features=(6, 0, 0, -6), seed=1
    ),
    Composition(
        front="tokens",
        layers=("linear", "relu"),
        wrapper="compiled",
        loss="ignored",
        way="terms",
        microbatch=1,
        l2=0.3,
        seed=5,
    ),
    Composition(
        front="sequence",
        layers=("relu", "relu", "lstm"),
        wrapper="frozen",
        loss="weighted classes",
        form="data set",
        features=(4, -3, 0, 2),
        weights=0,
        fitted=False,
        microbatch=3,
        reduction="sum",
        seed=3,
    ),
)


@pytest.mark.full("problems that were wrong once")
def test_examples_are_right_or_refused():
    failed = report([(c, judge(c)) for c in EXAMPLES[:3]])
    assert not failed, "\n".join(failed)


@pytest.mark.full("sixty problems")
def test_compositions_are_right_or_refused():
    failed = report(judged(FEW, EXAMPLES))
    assert not failed, "\n".join(failed)


@pytest.mark.long
def test_many_compositions_are_right_or_refused():
    failed = report(judged(MANY))
    assert not failed, "\n".join(failed)


def test_a_composition_is_made_again_from_its_repr():
    c = Composition(layers=("conv", "relu"), features=(6, 0, 0, -6), params=("!*head.bias",), microbatch=3)
    assert eval(repr(c)) == c
