# SPDX-License-Identifier: Apache-2.0
"""Times of contestants that take turns, so that whatever else the machine does hits all of them alike."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from diffusers_dq.benchmark.failures import reason_of

Call = Callable[[], object]
_MIN_ROUNDS = 5


class Timer(Protocol):
    def seconds(self, call: Call) -> float:
        """What one call takes, the device's work included."""


class CpuTimer:
    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def seconds(self, call: Call) -> float:
        start = self._clock()
        call()
        return self._clock() - start


class CudaTimer:
    """CUDA events around the call. flush_bytes: overwritten before each, to empty the L2 cache; 0 leaves it."""

    def __init__(self, flush_bytes: int = 0) -> None:
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device="cuda") if flush_bytes else None

    def seconds(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if self._flush is not None:
            self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Spread:
    """Of the rounds of one contestant, milliseconds a call."""

    median_ms: float
    quartile_low_ms: float
    quartile_high_ms: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int = 1) -> "Spread":
        """seconds: of each round, which made `calls` calls. Raises ValueError for none."""
        if not seconds:
            raise ValueError("no times to summarize: the contestant has not run once")
        ms = [1e3 * value / calls for value in seconds]
        low, median, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else 3 * ms
        return cls(median, low, high, len(ms))


@dataclass
class Times:
    """seconds: contestant -> a time a round.   failures: contestant -> why it stopped."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def interleave(
    contestants: Mapping[str, Call],
    timer: Timer,
    *,
    rounds: int,
    seed: int = 0,
    max_seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Each round times every contestant once, in a new random order.

    rounds: at most; after `max_seconds` no further one begins, but 5 are always run. A contestant that raises leaves
    the race, and its times are dropped.
    """
    times = Times({name: [] for name in contestants})
    order = random.Random(seed)
    start = clock()
    for done in range(rounds):
        if done >= _MIN_ROUNDS and clock() - start > max_seconds:
            break
        running = sorted(times.seconds)
        for name in order.sample(running, len(running)):
            try:
                times.seconds[name].append(timer.seconds(contestants[name]))
            except Exception as error:
                times.failures[name] = reason_of(error)
                del times.seconds[name]
    return times
