# SPDX-License-Identifier: Apache-2.0
"""Compile what the launchers would launch on GPUs that need not be here, and count what matters.

    python tests/kernels/compile_ahead.py [--thorough] [--candidates] [--op OP] [80 89 ...]

Run without TRITON_INTERPRET. The launchers run on CPU tensors under a driver that only pretends to be a GPU, so tiles,
argument types and specialization are those of a real launch. Prints one JSON object a line for each distinct
compilation: kernel, op, variants that lead to it, capability, constants, registers, stack bytes (where spills go),
shared bytes, and how often an instruction occurs in the PTX.

Without --thorough: of every tile the lightest and the heaviest epilogue, for the capabilities in QUICK.
--thorough: every epilogue and dtype, for those in CAPABILITIES.
--op OP: only this one.
--candidates: the tiles that the tuner tries, and not those of the tables.
"""

import argparse
import functools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from diffusers_dq_kernels import _library, _tiles, rotation_order, tune
from diffusers_dq_kernels._tiles import BUCKETS, Tile, table_name

torch.set_num_threads(1)  # threads of OpenMP do not survive the fork below

# What is compiled ahead: the architectures that have a table of tiles, all of them by hand (DIFFUSERS_DQ_THOROUGH, and
# the tuner's candidates under `slow`), four in every run of the tests: one for each way of multiplying and size of
# shared memory. 80 mma.sync in 163 KiB, 89 the same in 99 KiB, 90 wgmma, 100 what Triton makes of tcgen05's
# architecture. 86 takes tiles that 80 takes; 120, with the instructions and memory of 89, has three of its own,
# which only the set by hand compiles. GPUs in between (87, 103, 121) take the tiles of the next lower one.
CAPABILITIES = (80, 86, 89, 90, 100, 120)
QUICK = (80, 89, 90, 100)
_INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "prmt")
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

# K of whole blocks, K with a tail in blocks of 64 that is still aligned where a byte holds two values, and K that is
# read by single bytes. N has a tail everywhere.
_EVEN, _TAIL, _RAGGED, _N = 2304, 2272, 2250, 1136


@dataclass(frozen=True)
class Case:
    """One call of an op's launcher. args: makes them, on the CPU; only dtypes, sizes and alignment matter."""

    op: str
    variant: str
    args: Callable[[], tuple[Any, ...]]
    pinned: Tile | None = None  # in place of what the tables say

    def run(self) -> None:
        launcher = _library._FORMS[self.op].triton
        assert launcher is not None
        with nullcontext() if self.pinned is None else _tiles.pinned(self.op, self.pinned):
            launcher(*self.args())


# What is compiled: one function an op


CasesOf = Callable[[int, bool], Iterator[Case]]
CASES: dict[str, CasesOf] = {}


def cases_of(*ops: str) -> Callable[[Callable[..., Iterator[Case]]], Callable[..., Iterator[Case]]]:
    """Register a function (op, capability, thorough) -> cases for these ops."""

    def register(function: Callable[..., Iterator[Case]]) -> Callable[..., Iterator[Case]]:
        CASES.update((op, functools.partial(function, op)) for op in ops)
        return function

    return register


@cases_of(
    *("quantize_static", "quantize_dynamic", "quantize_grouped"),
    *("norm_quantize_static", "norm_quantize_dynamic", "gelu_quantize_static", "gelu_quantize_dynamic"),
)
def _rows_cases(op: str, capability: int, thorough: bool) -> Iterator[Case]:
    """rotation: by blocks of 64 or 256, or over the whole width, by way of the matrix of order 36."""
    bf16, fp32 = torch.bfloat16, torch.float32
    wanted = [(1152, "blocks", bf16), (4608, "whole", bf16)]
    if thorough:
        wanted += [(k, rotation, bf16) for k in (1152, 4608) for rotation in ("no", "blocks", "whole")]
        wanted += [(4608, "no", fp32), (4608, "whole", fp32), (8192, "no", bf16)]
    for k, rotation, dtype in dict.fromkeys(wanted):
        args = functools.partial(rows_args, op, k, rotation, dtype)
        yield Case(op, f"{_name(dtype)}, K = {k}, {rotation} rotation", args)


def rows_args(op: str, k: int, rotation: str, dtype: torch.dtype) -> tuple[Any, ...]:
    vector, modulation = torch.empty(k, dtype=dtype), torch.empty(2, k, dtype=dtype)
    norm = ("layer", 1e-6, vector, vector, modulation, modulation, True) if op.startswith("norm") else ()
    table = (torch.empty(4), torch.empty(4, dtype=torch.int32)) if op.endswith("static") else ()
    transform = (torch.zeros(1, dtype=torch.int64), torch.empty(4, k), torch.empty(k), 8)
    groups = (128, False) if op.endswith("grouped") else ()
    order = 1 if rotation == "no" else rotation_order(k, full_width=rotation == "whole")
    signs = None if rotation == "no" else torch.ones(k, dtype=torch.int8)
    return torch.empty(64, k, dtype=dtype), *norm, *table, *transform, *groups, signs, order


@cases_of("linear_w8a8", "linear_w4a8")
def _integer_cases(op: str, capability: int, thorough: bool) -> Iterator[Case]:
    make = functools.partial(integer_args, op)
    fp32 = torch.float32
    tiers: dict[str, list[tuple[str, dict[str, Any]]]] = {
        table_name(op): [
            ("plain", dict(k=_EVEN)),
            ("dynamic", dict(k=_EVEN, static=False)),
            ("one scale", dict(k=_EVEN, static=None)),
            ("integers", dict(k=_EVEN, out_dtype=torch.int32)),
        ],
        table_name(op, finish="gelu"): [
            ("GELU", dict(k=_EVEN, finish="gelu")),
            ("one scale, GELU", dict(k=_EVEN, static=None, finish="gelu")),
            ("dynamic, GELU", dict(k=_EVEN, static=False, finish="gelu")),
            ("GELU, odd N", dict(k=_EVEN, finish="gelu", n=_N + 1)),
        ],
        table_name(op, finish="residual"): [
            ("all, K tail", dict(k=_TAIL, finish="all")),
            ("dynamic, all, K tail", dict(k=_TAIL, static=False, finish="all")),
            ("residual", dict(k=_EVEN, finish="residual")),
            ("all, odd N", dict(k=_EVEN, finish="all", n=_N + 1)),
        ],
        table_name(op, fp32=True): [("all, fp32", dict(k=_TAIL, finish="all", out_dtype=fp32))],
    }
    if thorough:
        tiers[table_name(op, fp32=True)] += [
            ("dynamic, all, fp32", dict(k=_TAIL, static=False, finish="all", out_dtype=fp32)),
            ("GELU, fp32", dict(k=_EVEN, finish="gelu", out_dtype=fp32)),
        ]
    for table, variants in tiers.items():
        yield from _linear_cases(op, table, capability, make, variants if thorough else variants[:1])
    if op == "linear_w4a8":
        two_level = functools.partial(make, k=_EVEN, finish="all", multiplier=True)
        for m in BUCKETS:
            yield Case(op, f"two levels, all, M = {m}", functools.partial(two_level, m))
    for static in (True, False) if thorough else (True,):
        ragged = functools.partial(make, 512, k=_RAGGED, static=static, finish="all")
        yield Case(op, f"{'static' if static else 'dynamic'}, ragged", ragged)


def integer_args(
    op: str,
    m: int,
    *,
    k: int,
    static: bool | None = True,
    finish: str = "plain",
    out_dtype: torch.dtype = torch.bfloat16,
    n: int = _N,
    multiplier: bool = False,
) -> tuple[Any, ...]:
    """static: None for one input scale, which is in the weight's."""
    xq = _input(m, k, torch.int8)
    scale, zero_point = None if static is None else torch.empty(xq.shape[:-1]), None
    if static:
        scale, zero_point = torch.empty(4), torch.empty(4, dtype=torch.int32)
    return (
        xq,
        _weight(n, k, packed=op == "linear_w4a8"),
        torch.empty(n),
        scale,
        zero_point,
        torch.empty(n, dtype=torch.int32) if static else None,
        torch.empty(4, n),
        torch.zeros(1, dtype=torch.int64),
        out_dtype,
        *_finish(xq, n, finish, torch.float32 if out_dtype == torch.float32 else torch.bfloat16),
        *((torch.ones(n, k // 128, dtype=torch.int8),) if multiplier else ()),
    )


@cases_of("linear_w8a16", "linear_w4a16")
def _weight_only_cases(op: str, capability: int, thorough: bool) -> Iterator[Case]:
    make = functools.partial(weight_only_args, op)
    for dtype in (torch.bfloat16, torch.float32, torch.float16) if thorough else (torch.bfloat16, torch.float32):
        name, fp32 = _name(dtype), dtype == torch.float32
        tiers: dict[str, list[tuple[str, dict[str, Any]]]] = {
            table_name(op, fp32): [(f"{name}, plain", dict(k=_EVEN, dtype=dtype))],
            table_name(op, fp32, "gelu"): [
                (f"{name}, GELU", dict(k=_EVEN, finish="gelu", dtype=dtype)),
                (f"{name}, GELU, odd N", dict(k=_EVEN, finish="gelu", dtype=dtype, n=_N + 1)),
            ],
            table_name(op, fp32, "residual"): [
                (f"{name}, all, K tail", dict(k=_TAIL, finish="all", dtype=dtype)),
                (f"{name}, residual", dict(k=_EVEN, finish="residual", dtype=dtype)),
                (f"{name}, all, odd N", dict(k=_EVEN, finish="all", dtype=dtype, n=_N + 1)),
            ],
        }
        for table, variants in tiers.items():
            if thorough or (table.endswith("+residual") if fp32 else not table.endswith("+gelu")):
                yield from _linear_cases(op, table, capability, make, variants if thorough else variants[:1])
        for zero_points in (False, True) if thorough else (True,):
            of_groups = functools.partial(
                make, k=_EVEN, finish="all", dtype=dtype, groups=True, zero_points=zero_points
            )
            for m in BUCKETS if thorough or not fp32 else ():
                variant = f"{name}, groups, {'zero points, ' * zero_points}all, M = {m}"
                yield Case(op, variant, functools.partial(of_groups, m))
        yield Case(op, f"{name}, ragged", functools.partial(make, 512, k=_RAGGED, finish="all", dtype=dtype))


def weight_only_args(
    op: str,
    m: int,
    *,
    k: int,
    dtype: torch.dtype,
    finish: str = "plain",
    n: int = _N,
    groups: bool = False,
    zero_points: bool = False,
) -> tuple[Any, ...]:
    """groups: of 128 channels."""
    x = _input(m, k, dtype)
    weight = _weight(n, k, packed=op == "linear_w4a16")
    scale = torch.empty(n, k // 128) if groups else torch.empty(n)
    group = torch.zeros(1, dtype=torch.int64)
    of_groups = (torch.empty(n, k // 128, dtype=torch.int8),) if zero_points else ()
    return x, weight, scale, torch.empty(4, n), group, *_finish(x, n, finish, dtype), *of_groups


@cases_of("linear_grouped")
def _grouped_cases(op: str, capability: int, thorough: bool) -> Iterator[Case]:
    for bits in (4, 8) if thorough else (4,):
        for input_groups in (False, True):
            for finish in ("plain", "all") if thorough else ("all",):
                of = "input and weight" if input_groups else "weight"
                for m in BUCKETS:
                    args = functools.partial(grouped_args, m, bits, input_groups, finish)
                    yield Case(op, f"{bits} bits, groups of {of}, {finish}, M = {m}", args)


def grouped_args(m: int, bits: int, input_groups: bool, finish: str, k: int = _EVEN) -> tuple[Any, ...]:
    """Groups of 128. A zero point on both sides where the input has groups, as in Q-DiT."""
    xq, groups = _input(m, k, torch.int8), k // 128
    lead = xq.shape[:-1]
    return (
        xq,
        _weight(_N, k, packed=bits == 4),
        torch.empty(_N, groups),
        torch.empty(*lead, groups if input_groups else 1),
        torch.empty(*lead, groups, dtype=torch.int32) if input_groups else None,
        torch.empty(_N, groups, dtype=torch.int8) if bits == 4 else None,
        torch.empty(_N, groups, dtype=torch.int32) if input_groups else None,
        torch.empty(4, _N),
        torch.zeros(1, dtype=torch.int64),
        torch.bfloat16,
        *_finish(xq, _N, finish, torch.bfloat16),
    )


@cases_of("attention_int8")
def _attention_cases(op: str, capability: int, thorough: bool) -> Iterator[Case]:
    heads = (32, 64, 72, 96, 128, 256) if thorough else (32, 72, 128)
    for d in heads:
        for keys in (256, 300, 1024, 1030) if thorough else (256, 1030):
            for bits in (8, 6) if thorough else (8,):
                args = functools.partial(attention_args, d, keys, bits)
                yield Case(op, f"heads of {d}, {keys} keys, {bits} bits", args)


def attention_args(d: int, keys: int, bits: int) -> tuple[Any, ...]:
    query, key, value = (torch.empty(2, 4, n, d, dtype=torch.bfloat16) for n in (1024, keys, keys))
    return query, key, value, *(torch.empty(1) for _ in range(4)), d**-0.5, bits


def _linear_cases(
    op: str, table: str, capability: int, make: Callable[..., tuple[Any, ...]], variants: list[tuple[str, Any]]
) -> Iterator[Case]:
    """Every tile that a table look-up can give: by bucket, and of entries for a single size."""
    exact = {
        entry.tile
        for shipped in _tiles.shipped_tables()
        for entry in shipped.ops.get(table, ())
        if shipped.architecture == divmod(capability, 10) and entry.n is not None
    }
    for variant, sizes in variants:
        for m in BUCKETS:
            yield Case(op, f"{variant}, M = {m}", functools.partial(make, m, **sizes))
        for tile in sorted(exact):
            yield Case(op, f"{variant}, tile of one size", functools.partial(make, 512, **sizes), tile)


def candidate_cases(capability: int) -> Iterator[Case]:
    """The tuner's candidates, with the heaviest epilogue that a table of their name serves."""
    for op, problem in tune.PROBLEMS.items():
        make = functools.partial(weight_only_args if problem.weight_only else integer_args, op)
        kinds: dict[str, Any] = dict(dtype=torch.bfloat16) if problem.weight_only else {}
        for finish, heaviest in (("", "plain"), ("gelu", "gelu"), ("residual", "all")):
            name = table_name(op, finish=finish)
            for tile in tune.candidates(name, divmod(capability, 10)):
                k = _TAIL if finish == "residual" else _EVEN
                yield Case(op, name, functools.partial(make, 512, k=k, finish=heaviest, **kinds), tile)


def _input(m: int, k: int, dtype: torch.dtype) -> Tensor:
    batch = 1 if m < 32 else 2
    return torch.empty(batch, m // batch, k, dtype=dtype)


def _weight(n: int, k: int, packed: bool) -> Tensor:
    return torch.empty(n, k // 2, dtype=torch.uint8) if packed else torch.empty(n, k, dtype=torch.int8)


def _finish(x: Tensor, n: int, finish: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """gate, residual and activation."""
    batch, tokens, _ = x.shape
    gated = finish in ("residual", "all")
    return (
        torch.empty(batch, 1, n, dtype=dtype) if gated else None,
        torch.empty(batch, tokens, n, dtype=dtype) if gated else None,
        "gelu_tanh" if finish in ("gelu", "all") else "none",
    )


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


# The GPU that is not there


class PretendedDriver:
    """As much of a Triton driver as compiling needs; the device index is the capability, which keeps caches apart."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Launches:
    """Of kernels, under `pretending`. wanted: the (kernel, key) to compile, or None to note them only."""

    wanted: frozenset[tuple[str, str]] | None = None
    current: tuple[str, str] | None = None
    noted: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    compiled: dict[tuple[str, str], Any] = field(default_factory=dict)

    def hook(self, *, key: Any, fn: Any, compile: dict[str, Any], **others: Any) -> bool:
        """Triton's jit_cache_hook, for kernels that are not compiled yet: True keeps it from compiling."""
        self.current = (fn.name, str(key))
        names = list(compile["signature"])
        self.noted[self.current] = {
            **{names[path[0]]: value for path, value in compile["constants"].items() if len(path) == 1},
            **{name: compile[name] for name in ("num_warps", "num_stages")},
        }
        return self.wanted is None or self.current not in self.wanted


@contextmanager
def pretending(capability: int, wanted: frozenset[tuple[str, str]] | None = None) -> Iterator[Launches]:
    """Within, launchers take CPU tensors for those of a GPU: kernels are specialized as there but do not run."""
    launches, run = Launches(wanted), JITFunction.run
    modules = [m for name, m in sys.modules.items() if name.startswith("diffusers_dq_kernels.")]
    lookups = [m for m in modules if hasattr(m, "capability")]
    before = {module: module.capability for module in lookups}

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launches.current = None
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel is not None and launches.current is not None:
            launches.compiled[launches.current] = kernel
        return kernel

    triton.runtime.driver.set_active(PretendedDriver(capability))
    JITFunction.run = warm
    knobs.runtime.jit_cache_hook = launches.hook
    for module in lookups:
        vars(module)["capability"] = lambda device: divmod(capability, 10)
    try:
        yield launches
    finally:
        JITFunction.run = run
        knobs.runtime.jit_cache_hook = None
        for module in lookups:
            vars(module)["capability"] = before[module]


# Compiling


@dataclass(frozen=True)
class Job:
    """A case, and which of its launches are compiled here: the others are those of an earlier case."""

    case: Case
    capability: int
    wanted: frozenset[tuple[str, str]]
    variants: dict[tuple[str, str], list[str]]


def jobs(capability: int, cases: Iterator[Case]) -> list[Job]:
    found: list[Job] = []
    variants: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        with pretending(capability) as launches:
            case.run()
        assert launches.noted, f"{case.op}, {case.variant}: its launcher launched nothing"
        wanted = frozenset(launches.noted) - variants.keys()
        for launch in launches.noted:
            variants.setdefault(launch, []).append(case.variant)
        if wanted:
            found.append(Job(case, capability, wanted, variants))
    return found


def all_cases(capability: int, thorough: bool) -> Iterator[Case]:
    for op, cases in CASES.items():
        if op in _library._FORMS:
            yield from cases(capability, thorough)


_JOBS: list[Job] = []  # the processes of the pool are forked: nothing of a job has to be sent


def compile_job(index: int) -> list[dict[str, Any]]:
    job = _JOBS[index]
    error = None
    with pretending(job.capability, job.wanted) as launches:
        try:
            job.case.run()
        except Exception as failure:  # of one kernel: the others still count
            error = f"{type(failure).__name__}: {failure}"
    return [
        {
            "kernel": launch[0].strip("_"),
            "op": job.case.op,
            "variants": job.variants[launch],
            "capability": job.capability,
            "constants": launches.noted.get(launch),
            **(_figures(launches.compiled[launch]) if launch in launches.compiled else {"error": error}),
        }
        for launch in sorted(job.wanted)
    ]


def _figures(kernel: Any) -> dict[str, int]:
    ptx = kernel.asm["ptx"]
    counts = {name: len(re.findall(re.escape(name), ptx)) for name in _INSTRUCTIONS}
    return {"shared": kernel.metadata.shared, **_resources(kernel.asm["cubin"]), **counts}


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes a thread. A register that does not fit is spilled to the stack; nothing else is."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        key: int(value)
        for key, name in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
        for value in re.findall(rf"\b{name}:(\d+)", usage)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("capabilities", type=int, nargs="*", help="those of the set where none is given")
    parser.add_argument("--thorough", action="store_true")
    parser.add_argument("--candidates", action="store_true")
    parser.add_argument("--op", help="only this one")
    options = parser.parse_args()
    for capability in options.capabilities or (CAPABILITIES if options.thorough or options.candidates else QUICK):
        cases = candidate_cases(capability) if options.candidates else all_cases(capability, options.thorough)
        _JOBS.extend(jobs(capability, (case for case in cases if options.op in (None, case.op))))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        for reports in pool.map(compile_job, range(len(_JOBS))):
            for report in reports:
                print(json.dumps(report, default=str), flush=True)


if __name__ == "__main__":
    main()
