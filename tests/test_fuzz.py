"""Problems composed at random: right or refused, whatever the composition."""

from collections import Counter

import pytest
from hazards.fuzz import Composition, compositions, judge
from hypothesis import HealthCheck, Phase, example, given, settings

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


EXAMPLES = ()


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
