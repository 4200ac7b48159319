# SPDX-License-Identifier: Apache-2.0
"""torchao and SDNQ, as their users apply them to a diffusers transformer. Imported when they are measured."""

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from torch import nn

_FEW_ROWS = 16  # torch._int_mm on CUDA takes more than these: linears with fewer stay as they are


def torchao_int8(model: nn.Module, rows: Mapping[str, int]) -> nn.Module:
    """int8 weights a channel, activations int8 a token, found at run time."""
    quantization = _import("torchao.quantization", "torchao")
    return _torchao(model, rows, quantization.Int8DynamicActivationInt8WeightConfig())


def torchao_float8(model: nn.Module, rows: Mapping[str, int]) -> nn.Module:
    """float8 weights a channel, activations float8 a token, found at run time."""
    quantization = _import("torchao.quantization", "torchao")
    config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    return _torchao(model, rows, config)


def _torchao(model: nn.Module, rows: Mapping[str, int], config: Any) -> nn.Module:
    def taken(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        return not module.weight.is_cuda or rows.get(name, 0) > _FEW_ROWS

    _import("torchao.quantization", "torchao").quantize_(model, config, filter_fn=taken)
    return model


def sdnq_int8(model: nn.Module, rows: Mapping[str, int]) -> nn.Module:
    """int8 weights a channel and its int8 matmul. It skips and falls back as it sees fit; 'eager' compiles inside."""
    sdnq = _import("sdnq", "sdnq")
    return sdnq.sdnq_post_load_quant(
        model, weights_dtype="int8", use_quantized_matmul=True, torch_dtype=torch.bfloat16
    )


def import_plain_sdnq() -> None:
    """For a dry run: SDNQ compiles parts of itself with Inductor, unless Dynamo is off while it is imported."""
    with suppress(ImportError), torch._dynamo.config.patch(disable=True):
        import_module("sdnq")


def _import(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{package} is not usable here ({error}); pip install 'diffusers-dq[benchmark]'") from error
