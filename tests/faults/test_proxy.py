"""The proxy does what it says, before servers that are not ours."""

from contextlib import nullcontext

import clouds
import pytest
from proxy import call, cut_before, cut_in_body, delay, lose_answer, mixture, passing, proxied, refuse, stale

from pipeline.storage.output import Output

BODY = b"0123456789" * 1000

pytestmark = pytest.mark.full("of what stands in the way in other tests")


@pytest.fixture(scope="module", params=["moto", "seaweed"])
def server(request):
    try:
        with clouds.CLOUDS[request.param]() as behind, proxied(behind) as proxy:
            for _ in clouds.started(lambda: nullcontext(proxy.cloud)):
                yield proxy
    except clouds.NotInstalledError as missing:
        pytest.skip(f"not on this machine: {missing}")


@pytest.fixture
def direct(proxy):
    """The server without the proxy."""
    return Output(proxy.server.url, proxy.server.endpoint)


def test_what_passes_is_unchanged(proxy, direct):
    """Signatures too, which one of the servers checks."""
    output = Output(f"{proxy.cloud.url}/passes")
    output.put("a", BODY)
    output.put("empty", b"")
    assert output.get("a") == BODY
    assert output.sizes() == {"a": len(BODY), "empty": 0}
    assert direct.get("passes/a") == BODY
    assert not any(request.fault for request in proxy.requests)


@pytest.mark.parametrize(("action", "stored"), [(cut_before, False), (cut_in_body, False), (lose_answer, True)])
def test_what_a_cut_leaves(proxy, direct, action, stored):
    found = []
    name = f"cut/{action.__name__}"
    rule = proxy.rule(action, method="PUT", path=name, times=1)
    proxy.rule(call(lambda request: found.append(direct.get(name))), method="PUT", path=name)
    Output(proxy.cloud.url).put(name, BODY)  # tried again
    assert rule.done == 1
    assert found[-1] == (BODY if stored else None)
    assert direct.get(name) == BODY


def test_rules_count(proxy):
    output = Output(proxy.cloud.url)
    proxy.rule(refuse(503, "SlowDown"), method="PUT", path="counted", after=1, times=2)
    for k in range(2):
        output.put(f"counted/{k}", BODY)
    faults = [request.fault for request in proxy.requests if "counted" in request.path]
    assert faults == ["", "503 SlowDown", "503 SlowDown", ""]


def test_a_callback_learns_who_asks(proxy):
    told = []
    proxy.rule(call(told.append), method="PUT", times=1)
    Output(proxy.cloud.url).put("told", BODY)
    (request,) = told
    assert request.client == proxy.requests[-1].client
    assert request.client[0] == "127.0.0.1"


def test_a_stale_listing(proxy):
    output = Output(f"{proxy.cloud.url}/listed")
    output.put("a", BODY)
    rule = proxy.rule(stale(), method="GET", path="list-type")
    assert set(output.sizes()) == {"a"}
    output.put("b", BODY)
    assert set(output.sizes()) == {"a"}
    proxy.rules.remove(rule)
    assert set(output.sizes()) == {"a", "b"}


def test_a_mixture_is_the_same_for_the_same_seed(proxy):
    """Whatever the order of requests."""

    def faults(seed, names):
        proxy.clear()
        shares = {cut_before: 0.2, lose_answer: 0.1, refuse(500, "InternalError"): 0.1, delay(0): 0.1}
        proxy.rule(mixture(seed, shares), method="PUT")
        for name in names:
            Output(proxy.cloud.url).put(f"mixed/{name}", BODY)
        return sorted((request.path, request.fault) for request in proxy.requests)

    names = range(12)
    assert faults(1, names) == faults(1, reversed(names))
    assert len({fault for _, fault in faults(1, names)} - {passing.__name__}) > 2
    assert faults(1, names) != faults(2, names)
