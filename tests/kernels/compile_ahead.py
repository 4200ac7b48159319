# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel with every tile it ships, for GPUs that need not be here, and count what matters.

    python tests/kernels/compile_ahead.py [80 89 ...]

Run without TRITON_INTERPRET. Prints one JSON object a line: kernel, variant, capability, tile, registers, stack bytes
(where spills go), shared bytes, and how often an instruction occurs in the PTX.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffusers_dq_kernels import linear_w4a8, linear_w8a8, linear_weight_only, quantize
from diffusers_dq_kernels._gemm import _GROUP_M, RAGGED, Tile, TileTable, tiles_for

CAPABILITIES = (80, 89, 90, 100)
_INSTRUCTIONS = ("wgmma.mma_async", "mma.sync", "tcgen05.mma", "prmt")
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

_LINEAR_TYPES = {
    "x_ptr": "*i8",
    "weight_ptr": "*i8",
    "y_ptr": "*bf16",
    "weight_scale_ptr": "*fp32",
    "weight_sum_ptr": "*i32",
    "input_scale_ptr": "*fp32",
    "zero_point_ptr": "*i32",
    "bias_ptr": "*fp32",
    "group_ptr": "*i64",
}
_DYNAMIC = {"weight_sum_ptr": None, "zero_point_ptr": None}
_WEIGHT_ONLY = {"x_ptr": "*bf16", "weight_sum_ptr": None, "input_scale_ptr": None, "zero_point_ptr": None}
_QUANTIZE_TYPES = {
    "x_ptr": "*bf16",
    "q_ptr": "*i8",
    "scale_ptr": "*fp32",
    "zero_point_ptr": "*i32",
    "group_ptr": "*i64",
    "shift_ptr": "*fp32",
    "inv_smooth_ptr": "*fp32",
    "tiny": "fp32",
}


@dataclass(frozen=True)
class Job:
    """One compilation: the name of a kernel in its module, argument types by name, and its constants."""

    kernel: str
    variant: str
    capability: int
    types: dict[str, str | None]
    constants: dict[str, int]
    aligned: bool
    num_warps: int = 4
    num_stages: int = 3


_KERNELS = {
    "w8a8": linear_w8a8._linear_w8a8_kernel,
    "w4a8": linear_w4a8._linear_w4a8_kernel,
    "weight_only": linear_weight_only._linear_weight_only_kernel,
    "quantize_static": quantize._quantize_static_kernel,
    "quantize_dynamic": quantize._quantize_dynamic_kernel,
}


def jobs(capabilities: tuple[int, ...]) -> Iterator[Job]:
    for capability in capabilities:
        yield from _linear("w8a8", "static", capability, linear_w8a8.TILES, {})
        yield from _linear("w8a8", "dynamic", capability, linear_w8a8.TILES, _DYNAMIC)
        yield from _linear("w4a8", "static", capability, linear_w4a8.TILES, {"weight_ptr": "*u8"})
        yield from _linear("weight_only", "int8", capability, linear_weight_only.TILES, _WEIGHT_ONLY)
        full = {**_WEIGHT_ONLY, "x_ptr": "*fp32", "y_ptr": "*fp32"}
        yield from _linear("weight_only", "int8 and fp32", capability, linear_weight_only.TILES_FP32, full)
        packed = {**_WEIGHT_ONLY, "weight_ptr": "*u8"}
        yield from _linear("weight_only", "int4", capability, linear_weight_only.TILES, packed)
        for kernel in ("quantize_static", "quantize_dynamic"):
            yield Job(kernel, "shifted", capability, _QUANTIZE_TYPES, {"BLOCK_K": quantize._MAX_BLOCK_K}, True)


def _linear(kernel: str, variant: str, capability: int, tiles: TileTable, types: dict[str, Any]) -> Iterator[Job]:
    shipped = tiles_for(tiles, divmod(capability, 10))
    for _, tile in shipped:
        yield _linear_job(kernel, variant, capability, tile, types)
        yield _linear_job(kernel, f"{variant}, K tail", capability, tile, types, even_k=False)
    yield _linear_job(kernel, f"{variant}, ragged", capability, RAGGED, types, even_k=False, aligned=False)


def _linear_job(
    kernel: str,
    variant: str,
    capability: int,
    tile: Tile,
    types: dict[str, Any],
    even_k: bool = True,
    aligned: bool = True,
) -> Job:
    constants = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": _GROUP_M,
        "EVEN_K": int(even_k),
    }
    types = {**_LINEAR_TYPES, **types}
    return Job(kernel, variant, capability, types, constants, aligned, tile.num_warps, tile.num_stages)


def compile_job(job: Job) -> dict[str, Any]:
    kernel = _KERNELS[job.kernel]
    types = {name: job.types.get(name, "i32") for name in kernel.arg_names}
    constants = {**job.constants, **{name: None for name, kind in types.items() if kind is None}}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and (kind.startswith("*") or (job.aligned and kind == "i32" and name not in fixed))
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible),
        target=GPUTarget("cuda", job.capability, 32),
        options={"num_warps": job.num_warps, "num_stages": job.num_stages},
    )
    ptx = compiled.asm["ptx"]
    report = {"shared": compiled.metadata.shared, **_resources(compiled.asm["cubin"])}
    return {**asdict(job), **report, **{name: len(re.findall(re.escape(name), ptx)) for name in _INSTRUCTIONS}}


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
        for key, field in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))
        for value in re.findall(rf"\b{field}:(\d+)", usage)
    }


def main(arguments: list[str]) -> None:
    capabilities = tuple(map(int, arguments)) or CAPABILITIES
    with ProcessPoolExecutor(2) as pool:
        for report in pool.map(compile_job, jobs(capabilities)):
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
