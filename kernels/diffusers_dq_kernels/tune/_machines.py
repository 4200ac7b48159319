# SPDX-License-Identifier: Apache-2.0
"""What tiles are tried on: the present GPU, or one that is made up.

A machine says why a tile cannot be used, and how long the usable ones take in microseconds. Both check results with
arguments whose exact result is known.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _triton
from .._library import _FORMS
from .._tiles import Tile, pinned
from ._problems import PROBLEMS, Size

__all__ = ["DryRun", "Gpu", "Machine"]

_WARM_UPS, _REPETITIONS = 3, 30
_FLUSHED_BYTES = 256 << 20  # more than any L2 cache
# The GPU waits this long before a timed call, so that Python has queued all of it: about half a millisecond.
_HEAD_START_CYCLES = 1_000_000


class Machine(Protocol):
    """name: of the GPU.   device: of tensors.   capability: of which tiles are tried."""

    name: str
    device: str
    capability: tuple[int, int]

    def objection(self, op: str, size: Size, tile: Tile) -> str | None:
        """Why `tile` cannot be used, or None."""

    def microseconds(self, op: str, size: Size, tiles: Sequence[Tile]) -> dict[Tile, float]:
        """The median time of each."""


class Gpu:
    """The present one. RuntimeError if there is none."""

    device = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA GPU: tiles can be timed only on the GPU they are for (--dry-run needs none)")
        if _triton.MISSING is not None:
            raise RuntimeError(f"{_triton.MISSING}: there is nothing to tune")
        self.name, self.capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()

    def objection(self, op: str, size: Size, tile: Tile) -> str | None:
        try:
            with pinned(op, tile), _launched() as kernels:
                exact = _is_exact(op, size, self.device, _launcher(op))
                self._call(op, size)()
            torch.cuda.synchronize()
        except _triton.triton.runtime.errors.TritonError as error:  # shared memory, or what ptxas refuses
            return str(error)
        spills = max(kernel.n_spills for kernel in kernels)
        if spills:
            return f"spills {spills} registers"
        return None if exact else "its result is wrong"

    def microseconds(self, op: str, size: Size, tiles: Sequence[Tile]) -> dict[Tile, float]:
        """Interleaved, so that a change of clocks meets all of them, each after a flush of the L2 cache."""
        call = self._call(op, size)
        flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=self.device)
        times: dict[Tile, list[float]] = {tile: [] for tile in tiles}
        for repetition in range(-_WARM_UPS, _REPETITIONS):
            for tile in tiles:
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with pinned(op, tile):
                    flushed.zero_()
                    torch.cuda._sleep(_HEAD_START_CYCLES)
                    start.record()
                    call()
                    stop.record()
                torch.cuda.synchronize()
                if repetition >= 0:
                    times[tile].append(1000 * start.elapsed_time(stop))
        return {tile: median(of_tile) for tile, of_tile in times.items()}

    def _call(self, op: str, size: Size) -> Callable[[], Tensor]:
        arguments, launcher = PROBLEMS[op].arguments(size, self.device), _launcher(op)
        return lambda: launcher(*arguments)


class DryRun:
    """A pretended sm_90 whose times are made up. Results are still checked, of a small product on the CPU."""

    name, device, capability = "dry run: times are made up", "cpu", (9, 0)

    def objection(self, op: str, size: Size, tile: Tile) -> str | None:
        small = size._replace(m=min(size.m, 16), n=min(size.n, 32), k=min(size.k, 64))
        # Triton's interpreter multiplies bits of bf16.
        interpreted = _triton.MISSING is None and _triton.triton.knobs.runtime.interpret
        through_triton = interpreted and not PROBLEMS[op].weight_only
        form = _launcher(op) if through_triton else getattr(torch.ops.diffusers_dq, op).default
        with pinned(op, tile):
            return None if _is_exact(op, small, self.device, form) else "its result is wrong"

    def microseconds(self, op: str, size: Size, tiles: Sequence[Tile]) -> dict[Tile, float]:
        return {
            tile: sum(size[:3]) / 100 + abs(tile.block_m - min(size.m, 128)) + 1000 / tile.block_n for tile in tiles
        }


def _is_exact(op: str, size: Size, device: str, form: Callable[..., Tensor]) -> bool:
    arguments = PROBLEMS[op].arguments(size, device, exact=True)
    return torch.equal(form(*arguments), PROBLEMS[op].expected(arguments))


def _launcher(op: str) -> Callable[..., Tensor]:
    launcher = _FORMS[op].triton
    assert launcher is not None
    return launcher


@contextmanager
def _launched() -> Iterator[list[Any]]:
    """Of every launch within, the compiled kernel."""
    function, kernels = _triton.triton.runtime.jit.JITFunction, []
    run = function.run

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, **kwargs))
        return kernels[-1]

    function.run = noting
    try:
        yield kernels
    finally:
        function.run = run
