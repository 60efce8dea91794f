"""How long a proof is going to take is said from what it is going to do."""

import pytest
import zoo

from pipeline import compute_hessian, verify_hessian
from pipeline.preflight.planner import make_plan
from pipeline.results import reference, verify
from pipeline.spec import Settings


@pytest.mark.parametrize("blocks", ["all", "diagonal"])
def test_effort_is_what_a_proof_does(tmp_path, monkeypatch, blocks):
    passes, products = 0, 0

    def counted(placed, vectors, *rest):
        nonlocal passes, products
        passes, products = passes + 1, products + len(vectors)
        return multiply(placed, vectors, *rest)

    multiply = reference.hessian_vector_products
    problem = zoo.mlp().problem
    H = compute_hessian(problem, str(tmp_path), executor="serial", blocks=blocks, verify=False)
    monkeypatch.setattr(reference, "hessian_vector_products", counted)
    assert verify_hessian(H, problem).ok
    evaluations = 1  # for the weight
    assert (passes + evaluations, products) == verify.effort(H.manifest)


def test_a_proof_by_differences_takes_longer():
    def proof(engine):
        return make_plan(zoo.mlp().problem, Settings(executor="serial", engine=engine)).around.proof

    assert proof("differences") > 3 * proof("jacrev")


def test_all_of_a_run_is_in_its_time():
    made = make_plan(zoo.mlp().problem, Settings(executor="ray", workers=2, verify=False))
    assert made.around.planning > 0
    assert made.around.start > 0
    assert made.around.proof == 0
    assert "planning, " in made.time_text()
    assert "starting workers, " in made.time_text()
    assert "tiles on 2 workers" in made.time_text()
    assert "proof" not in made.time_text()
