"""Bounds of counts: read once, kept, and found to be exceeded."""

import torch

from pipeline.problem.read_once import ReadOnce

NOTHING = torch.zeros(1)


def count(number):
    return torch.tensor(number)


def test_the_first_count_is_the_bound():
    counts = ReadOnce()
    assert counts.bound("a", count(5), 100) == 5
    assert counts.bound("a", count(3), 100) == 5
    assert not counts.exceeded(NOTHING)
    assert counts.bound("b", count(0), 100) == 1  # room for nothing is none


def test_one_that_is_exceeded_is_told_once():
    counts = ReadOnce()
    counts.bound("a", count(5), 100)
    assert counts.bound("a", count(6), 100) == 5
    counts.bound("a", count(4), 100)  # does not hide it
    assert counts.exceeded(NOTHING)
    assert not counts.exceeded(NOTHING)


def test_given_up():
    counts = ReadOnce()
    counts.bound("a", count(5), 100)
    counts.give_up()
    assert counts.bound("a", count(6), 100) == 100
    assert not counts.exceeded(NOTHING)
