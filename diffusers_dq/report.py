# SPDX-License-Identifier: Apache-2.0
"""What each linear of a model became, how many bytes it takes, which kernel runs it, and why any was left alone."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import diffusers_dq_kernels as ops
from diffusers_dq.attention import QuantizedAttnProcessor
from diffusers_dq.denoise import denoiser
from diffusers_dq.layout import LinearLayout
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.modulation import Modulation
from diffusers_dq.opensora.loading import model_class


@dataclass(frozen=True)
class LinearReport:
    """One linear, the two products of a quantized attention, or the change of a modulation that a block is given.

    bits: as W4A8; "-" of a modulation.   granularity: of the activation scale.
    groups: rows of its largest table a timestep group.
    nbytes: of all its tensors in the file.   backend: the kernel that runs it on the device it is on.
    reason: why it is in full precision, takes a slow path or is transformed online; "" if nothing is to say.
    """

    name: str
    bits: str
    granularity: str
    groups: int
    nbytes: int
    backend: str
    reason: str


@dataclass(frozen=True)
class QuantizationReport:
    """Printed, it is a table with a line a linear."""

    method: str
    linears: tuple[LinearReport, ...]

    @property
    def quantized(self) -> tuple[LinearReport, ...]:
        return tuple(row for row in self.linears if row.bits not in ("full", "-"))

    @property
    def kept(self) -> dict[str, str]:
        """Linears in full precision -> the reason."""
        return {row.name: row.reason for row in self.linears if row.bits == "full"}

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.linears)

    def __str__(self) -> str:
        header = ("linear", "bits", "activation", "groups", "bytes", "backend", "note")
        rows = [
            (row.name, row.bits, row.granularity, str(row.groups), f"{row.nbytes:,}", row.backend, row.reason)
            for row in self.linears
        ]
        widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in (header, *rows)
        ]
        linears = [row for row in self.linears if row.bits != "-"]
        counted = f"{len(self.quantized)} of {len(linears)} linears quantized"
        return "\n".join([*lines, f"{self.method}: {counted}, {self.nbytes:,} bytes in all"])


def inspect(model_or_path: Any, component: str | None = None) -> QuantizationReport:
    """What each linear of a quantized pipeline, transformer, or folder with one (`transformer/` or itself) is.

    component: "transformer" or "transformer_2" of a pipeline that has both.
    Raises ValueError where there is no transformer, FileNotFoundError where there is no such folder.
    """
    if isinstance(model_or_path, (str, os.PathLike)):
        folder = Path(model_or_path)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; expected a saved pipeline or transformer")
        part = folder / (component or "transformer")
        if component is not None and not part.is_dir():
            raise ValueError(f"{folder} holds no {component}; leave component out, or name one that it has")
        place = str(part if part.is_dir() else folder)
        model = model_class(place).from_pretrained(place)
    else:
        model = denoiser(model_or_path, component)
    quantizer = getattr(model, "hf_quantizer", None)
    config = quantizer.quantization_config if quantizer is not None else model.config.get("quantization_config")
    result = getattr(config, "result", None) or {}
    notes = result.get("notes", {})
    return QuantizationReport(
        method=getattr(config, "method", "not quantized"),
        linears=tuple(_rows(model, notes)),
    )


def _rows(model: nn.Module, notes: dict[str, str]) -> Iterator[LinearReport]:
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, QuantizedAttnProcessor):
            yield _attention_row(name, module, processor)
        elif isinstance(module, QuantizedLinear):
            yield _quantized_row(name, module, notes.get(name, ""))
        elif isinstance(module, Modulation):
            nbytes = sum(table.nbytes for table in (module.multiplier, module.offset))
            why = "carries what the block's norms are to put out for its linears"
            yield LinearReport(name, "-", "modulation", len(module.offset), nbytes, "torch", why)
        elif isinstance(module, nn.Linear):
            nbytes = sum(p.nbytes for p in module.parameters())
            yield LinearReport(name, "full", "", 0, nbytes, "torch", notes.get(name, "the model is not quantized"))


def _quantized_row(name: str, module: QuantizedLinear, note: str) -> LinearReport:
    layout = module.layout
    backend, slow = backend_of(layout, module.weight.device.type)
    tensors = [*module.parameters(), *(tensor for _, tensor in module.tables())]
    saved = module.weight.nbytes // 4 if layout.weight_bits == 6 else 0  # a file packs what is int8 in memory
    return LinearReport(
        name=name,
        bits=f"W{layout.weight_bits}A{layout.activation_bits}",
        granularity=_granularity(layout),
        groups=max(layout.bias_groups, layout.range_groups, layout.shift_groups),
        nbytes=sum(tensor.nbytes for tensor in tensors) - saved,
        backend=backend,
        reason="; ".join(part for part in (note, slow) if part),
    )


def _attention_row(name: str, module: nn.Module, processor: QuantizedAttnProcessor) -> LinearReport:
    nbytes = sum(tensor.nbytes for tensor in module.buffers(recurse=False))
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    backend, slow = ops.backend("attention_int8", device)
    if processor.softmax != "uniform":
        backend, slow = "torch", f"no kernel rounds softmax to {processor.softmax}: in floating point, slow"
    reason = "; ".join(filter(None, ("QK^T and AV over integers, softmax in fp32", slow)))
    return LinearReport(name, f"A{processor.bits}", "static, a tensor", 1, nbytes, backend, reason)


def _granularity(layout: LinearLayout) -> str:
    weight = f"; weight {layout.group_size} channels" * bool(layout.group_size and layout.input_rounding != "group")
    return _of_input(layout) + weight + f"; rank {layout.low_rank} beside" * bool(layout.low_rank)


def _of_input(layout: LinearLayout) -> str:
    if layout.input_rounding is None:
        return "not rounded"
    if layout.input_rounding == "group":
        return f"dynamic, {layout.group_size} channels"
    return "static, a tensor" if layout.static else f"dynamic, a {layout.input_rounding}"


def op_of(layout: LinearLayout) -> str | None:
    """The matrix product of a layer with this layout; None for a floating-point one."""
    if not layout.rounds_weight:
        return None
    if layout.group_size and layout.rounds_input:
        return "linear_grouped"
    container = 4 if layout.weight_bits == 4 else 8
    return f"linear_w{container}a{8 if layout.rounds_input else 16}"


def backend_of(layout: LinearLayout, device: str) -> tuple[str, str]:
    """(backend, why it is a slow one or "")."""
    op = op_of(layout)
    if op is None:
        return "torch", ""
    name, reason = ops.backend(op, device)
    return name, reason or ""
