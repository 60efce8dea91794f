"""What a model holds is put back: attributes, and what is in containers of any depth."""

from collections import OrderedDict, defaultdict, deque

import torch
from torch import nn

from pipeline.problem.kept import Kept, put_back


def held():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.plain, model[0].masks = 1, {3: [torch.ones(1)], "deep": {"er": deque([1, 2])}}
    model[0].order, model[0].counts, model[0].seen = OrderedDict(a=1, b=2), defaultdict(int, a=1), {1, 2}
    return model


def test_nothing_changes():
    model = held()
    kept = Kept(model)
    model(torch.randn(4, 2))  # running statistics are written into, and are put back otherwise
    assert kept.is_as_it_was()


def test_all_is_put_back():
    model = held()
    masks, before = model[0].masks, Kept(model)
    with put_back(model):
        model.plain, model[0].new = 2, torch.ones(2)
        model[0].masks[4] = "more"
        model[0].masks[3].append(torch.ones(2))
        model[0].masks["deep"]["er"].popleft()
        model[0].order.move_to_end("a")
        model[0].counts["b"] += 1
        model[0].seen.discard(1)
        model[0].register_buffer("made", torch.ones(1))
        model[1].running_mean = torch.ones(2)
        assert not before.is_as_it_was()
    assert before.is_as_it_was()
    assert model[0].masks is masks
    assert list(model[0].order) == ["a", "b"]
    assert masks["deep"]["er"] == deque([1, 2])
    assert not hasattr(model[0], "new")
    assert dict(model[0].named_buffers()) == {}


def test_what_holds_itself():
    model = nn.Linear(1, 1)
    model.own = [model]
    model.own.append(model.own)
    kept = Kept(model)
    model.own.append(3)
    kept.put_back()
    assert len(model.own) == 2
