# SPDX-License-Identifier: Apache-2.0
"""QK^T and AV over integers, as PTQ4DiT and HTG quantize attention: static per-tensor operands, rounded softmax.

Notation: B batch, H heads, N tokens, D head width.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from diffusers_dq import affine
from diffusers_dq.scheme import QuantScheme

OPERANDS = ("query", "key", "value")


class QuantizedAttnProcessor:
    """A diffusers attention processor for plain self-attention: projections, softmax(q k^T / sqrt(D)) v, output.

    query, key and value are rounded symmetrically with the scales `query_scale`, `key_scale`, `value_scale` [1] that
    `attach` registers as buffers of the Attention module; probabilities, in [0, 1], to 2^bits - 1 levels. The integers
    are multiplied as fp32 numbers. That is exact integer arithmetic: |q k^T| <= D 128^2 <= 2^24 for D <= 1024, and a
    row of probabilities adds up to no more than 255 + N / 2 levels, so |A v| < 2^24 for N <= 2^17. It saves no time.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.scheme = QuantScheme(bits=bits, granularity="tensor")

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("quantized attention is self-attention without a mask; use quantize_attention=False here")
        integers = (
            self._heads(projection(hidden_states), getattr(attn, f"{name}_scale"), attn.heads)
            for name, projection in zip(OPERANDS, (attn.to_q, attn.to_k, attn.to_v), strict=True)
        )
        query, key, value = integers  # [B, H, N, D], integers held as fp32
        logits = (query @ key.transpose(-1, -2)) * (attn.query_scale * attn.key_scale * attn.scale)
        levels = (1 << self.bits) - 1
        probabilities = affine.quantize_probability(logits.softmax(dim=-1), self.bits)
        output = (probabilities @ value) * (attn.value_scale / levels)
        output = output.transpose(1, 2).flatten(2).to(hidden_states.dtype)  # [B, N, H D]
        return attn.to_out[1](attn.to_out[0](output)) / attn.rescale_output_factor

    def _heads(self, x: Tensor, scale: Tensor, heads: int) -> Tensor:
        q = affine.quantize(x.float(), scale, 0, self.scheme).float()
        return q.unflatten(-1, (heads, -1)).transpose(1, 2)


def attach(attention: Any, bits: int, scales: dict[str, Tensor] | None, device: torch.device | str) -> None:
    """Quantize an Attention module's two products. scales: operand -> [1] fp32; None where a file will bring them."""
    for name in OPERANDS:
        scale = torch.ones(1, device=device) if scales is None else scales[name].to(device)
        attention.register_buffer(f"{name}_scale", scale)
    attention.set_processor(QuantizedAttnProcessor(bits))


def detach(attention: Any) -> None:
    """Undo `attach`."""
    for name in OPERANDS:
        delattr(attention, f"{name}_scale")
    attention.set_processor(AttnProcessor2_0())


def owns(module: nn.Module, leaf: str) -> bool:
    """Whether the buffer is one that `attach` registered."""
    quantized = isinstance(getattr(module, "processor", None), QuantizedAttnProcessor)
    return quantized and leaf in {f"{name}_scale" for name in OPERANDS}
