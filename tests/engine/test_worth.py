"""Steps over drafts are run where their measured time pays, and given up where it does not."""

from __future__ import annotations

import pytest

from mlx_vlm_pipes.engine.worth import Size, Worth

EIGHT: Size = (1, 8, False)
FOUR: Size = (1, 4, False)


def run(worth: Worth, tokens: int, cost: float, kept: float, hoped: float) -> tuple[float, int]:
    """Decode so many tokens where a plain step takes 1 and one over drafts `cost`; it keeps `kept`
    of the drafted ones where `hoped` are expected. Returns the time and the steps over drafts."""
    time, made, drafted = 0.0, 0.0, 0
    while made < tokens:
        if worth.gain(EIGHT, hoped):
            worth.note(EIGHT, round(1 + kept), cost)
            time, made, drafted = time + cost, made + 1 + kept, drafted + 1
        else:
            worth.note_plain(1, 1.0)
            time, made = time + 1, made + 1
    return time / made, drafted


def test_nothing_is_drafted_before_plain_steps_are_timed() -> None:
    worth = Worth()
    for _ in range(2):
        assert not worth.gain(EIGHT, 7)
        worth.note_plain(1, 1.0)
    assert worth.gain(EIGHT, 7) == 2  # by what it is taken to cost, half a plain step a token
    assert worth.gain(FOUR, 2) > worth.gain(EIGHT, 4)  # the narrow one is tried first
    worth.note(FOUR, 4, 1.1)
    assert worth.gain(EIGHT, 7) > worth.gain(FOUR, 3) > 3
    assert not worth.gain((2, 8, False), 14)  # two rows have not been timed


@pytest.mark.parametrize(
    ("cost", "kept", "hoped", "most"),
    [
        (1.3, 6, 6, 0.2),  # OpenBLAS, copying
        (1.3, 1, 1.4, 0.7),
        (7, 6, 7, 1.015),  # the reference BLAS: eight tokens for seven steps
        (7, 2, 3, 1.015),
        (7, 0, 1.4, 1.015),
        (1.6, 0, 2, 1.015),  # hopes that are always wrong
        (30, 0, 7, 1.02),
    ],
)
def test_what_drafts_lose_is_bounded(cost: float, kept: float, hoped: float, most: float) -> None:
    each, drafted = run(Worth(), 5000, cost, kept, hoped)
    assert each <= most
    assert drafted >= 1


def test_a_device_that_has_become_faster_is_found_out() -> None:
    worth = Worth()
    slow, _ = run(worth, 1000, 7, 2, 3)
    fast, drafted = run(worth, 6000, 1.3, 2, 3)
    assert slow < 1.02
    assert fast < 0.75
    assert drafted > 1000


def test_the_size_that_gives_most_tokens_for_its_time_is_preferred() -> None:
    worth = Worth()
    for _ in range(5):
        worth.note_plain(1, 1.0)
        worth.note(EIGHT, 8, 4.0)
        worth.note(FOUR, 4, 1.2)
    assert worth.gain(FOUR, 3) > worth.gain(EIGHT, 7) > 0
