# SPDX-License-Identifier: Apache-2.0
"""Turns, medians and failures, with clocks that stand still."""

import itertools

import pytest

from diffusers_dq.benchmark.timing import CpuTimer, Spread, interleave


class Recording:
    """A timer that notes whose turn it is, and takes the time it is told."""

    def __init__(self, *seconds):
        self.turns = []
        self.seconds_of = itertools.cycle(seconds or (1.0,))

    def seconds(self, call):
        self.turns.append(call())
        return next(self.seconds_of)


def contestants(*names):
    return {name: (lambda name=name: name) for name in names}


def test_the_timer_takes_the_difference_of_its_clock():
    assert CpuTimer(iter([10.0, 12.5]).__next__).seconds(lambda: None) == 2.5


def test_a_spread_has_medians_and_quartiles_of_a_call():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3000.0, 2000.0, 4000.0, 5)
    assert Spread.of([8.0], calls=8) == Spread(1000.0, 1000.0, 1000.0, 1)
    with pytest.raises(ValueError, match="no times"):
        Spread.of([])


def test_every_round_runs_every_contestant_once_in_an_order_of_the_seed():
    timer, again, other = Recording(), Recording(), Recording()
    interleave(contestants("a", "b", "c"), timer, rounds=20, seed=1)
    interleave(contestants("c", "b", "a"), again, rounds=20, seed=1)
    interleave(contestants("a", "b", "c"), other, rounds=20, seed=2)
    rounds = [tuple(timer.turns[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) > 1, "the order changes"
    assert timer.turns == again.turns != other.turns


def test_a_contestant_that_fails_leaves_with_its_reason_and_the_others_go_on():
    turns = itertools.count()

    def fails_in_the_second_round():
        if next(turns) == 1:
            raise RuntimeError("out of\n  luck")

    times = interleave({"good": lambda: None, "bad": fails_in_the_second_round}, Recording(), rounds=6)
    assert list(times.seconds) == ["good"]
    assert len(times.seconds["good"]) == 6
    assert times.failures == {"bad": "RuntimeError: out of luck"}


def test_ctrl_c_is_no_failure_of_a_contestant():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": interrupted}, Recording(), rounds=1)


def test_no_round_begins_after_the_time_is_up_but_five_are_run():
    clock = itertools.count(step=20).__next__
    times = interleave(contestants("a"), Recording(), rounds=100, max_seconds=15, clock=clock)
    assert len(times.seconds["a"]) == 5
