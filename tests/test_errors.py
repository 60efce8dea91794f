"""Sizes, times and counts as messages say them."""

import pytest

from pipeline.errors import counted, human_bytes, human_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (34_500_000, "34.5 MB"),
        (999_600_000, "1.00 GB"),
        (152.4e9, "152 GB"),
        (5e18, "5,000 PB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (17.23, "17.2 s"),
        (59.97, "1 min"),
        (247, "4 min 7 s"),
        (3599.7, "1 h"),
        (6720, "1 h 52 min"),
        (7170, "2 h"),
        (86400 * 3 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_human_seconds(seconds, text):
    assert human_seconds(seconds) == text


def test_counted():
    assert [counted(n, "tile") for n in (0, 1, 3081)] == ["0 tiles", "1 tile", "3,081 tiles"]
