"""Problems composed of ingredients: layers, wrappers, losses, forms of data, scales, types and flags; their verdict.

A composition is made again from its repr.
"""

import re
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from hazards.compared import compare
from hazards.composed import build
from hazards.compositions import FORMS, LOSSES, PARAMS, WAYS, Composition
from hazards.nets import FRONTS, LAYERS, WRAPPERS
from pipeline import ProblemError, compute_hessian


def some(values, common):
    """One of the values, half of the time the common one."""
    return st.one_of(st.just(common), st.sampled_from(values))


@st.composite
def compositions(draw):
    exponents = some(
        [tuple(k) for k in ((6, 0, 0, -6), (4, -3, 0, 2), (0, 0, 0, -6), (5, 5, 5, 5), (-6, -6, -6, -6))], (0,) * 4
    )
    return Composition(
        front=draw(st.sampled_from(list(FRONTS))),
        layers=tuple(draw(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=3))),
        wrapper=draw(some(list(WRAPPERS), "none")),
        loss=draw(st.sampled_from(LOSSES)),
        way=draw(some(WAYS, "torch")),
        form=draw(some(FORMS, "tuple")),
        features=draw(exponents),
        weights=draw(some((-6, -3, 2, 6), 0)),
        fitted=draw(st.booleans()),
        dtype=draw(st.sampled_from(("float64", "float32"))),
        separable=draw(some((True, False), True)),
        microbatch=draw(some((1, 3, 7), None)),
        params=draw(some(PARAMS, None)),
        l2=draw(some((1e-6, 0.3), 0.0)),
        reduction=draw(st.sampled_from(("mean", "sum"))),
        seed=draw(st.integers(0, 9)),
    )


@dataclass(frozen=True)
class Verdict:
    """What became of a composition.

    Attributes:
        kind: "right", "refused", "wrong" or "raised".
        reason: for a refusal its message without numbers and names; else where it went wrong, or what was raised.
    """

    kind: str
    reason: str = ""

    def __str__(self):
        return f"{self.kind}: {self.reason}" if self.reason else self.kind


def without_numbers(message: str) -> str:
    """What is common to messages of one kind."""
    message = re.sub(r"H\[[^\]]*\]", "H[_]", re.sub(r"`[^`]*`", "`_`", str(message).splitlines()[0]))
    return re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", message)[:160]


def judge(c: Composition) -> Verdict:
    """Run a composition, and compare."""
    made = build(c)
    try:
        problem = made.problem()
        found = compute_hessian(problem, executor="serial", dtype=c.dtype, microbatch=c.microbatch).to_numpy()
    except ProblemError as refusal:
        return Verdict("refused", without_numbers(str(refusal)))
    except Exception as error:
        return Verdict("raised", f"{type(error).__name__}: {without_numbers(error)}")
    where = compare(found.astype(np.float64), made, c.dtype)
    return Verdict("wrong", where) if where else Verdict("right")
