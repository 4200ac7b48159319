# SPDX-License-Identifier: Apache-2.0
"""QK^T and AV over integers, as PTQ4DiT and HTG quantize attention: static per-tensor operands, rounded softmax.

Notation: B batch, H heads, N tokens, D head width.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional as F

import diffusers_dq_kernels as ops
from diffusers_dq import affine
from diffusers_dq.scheme import QuantScheme

OPERANDS = ("query", "key", "value", "probability")
Softmax = Literal["uniform", "log_sqrt2"]
SAMPLED_QUERIES = 8


def scheme(operand: str, bits: int) -> QuantScheme:
    """Symmetric for query, key and value; probabilities start at zero and use all 2^bits levels above it."""
    return QuantScheme(bits=bits, granularity="tensor", symmetric=operand != "probability")


class QuantizedAttnProcessor:
    """A diffusers attention processor for plain self-attention: projections, softmax(q k^T scale) v, output.

    Each operand has a static scale [1] fp32, `query_scale`, `key_scale`, `value_scale` and `probability_scale`, which
    `attach` registers as buffers of the Attention module. `attention_int8` rounds and multiplies.
    softmax: "uniform" steps of probabilities, or "log_sqrt2", powers of sqrt(1/2) of the largest (RepQ-ViT), for which
        there is no kernel: the products are torch's, over the same integers of query, key and value.
    """

    def __init__(self, bits: int, softmax: Softmax = "uniform") -> None:
        self.bits = bits
        self.softmax = softmax

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
        query, key, value = (
            split_heads(projection(hidden_states), attn.heads) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        if not rounds_in_this_step(attn.to_q):
            output = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
            return _project_out(attn, output)
        scales = (getattr(attn, f"{name}_scale").float() for name in OPERANDS)  # model.to(dtype) casts them as well
        attend: Any = ops.attention_int8 if self.softmax == "uniform" else attention_log_sqrt2
        output = attend(query, key, value, *scales, attn.scale, self.bits)  # [B, H, N, D]
        return _project_out(attn, output)


def rounds_in_this_step(query: nn.Module) -> bool:
    """Whether the projection's step policy has activations rounded now; yes without a policy."""
    groups = getattr(query, "groups", None)
    return groups is None or groups.activation_bits is None or groups.activation_bits < 16


def _project_out(attn: Any, output: Tensor) -> Tensor:
    """output: [B, H, N, D].   Returns [B, N, H D]."""
    merged = output.transpose(1, 2).flatten(2)
    projected: Tensor = attn.to_out[1](attn.to_out[0](merged)) / attn.rescale_output_factor
    return projected


def attention_log_sqrt2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_scale: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    probability_scale: Tensor,
    scale: float,
    bits: int,
) -> Tensor:
    """`attention_int8` with probabilities rounded to powers of sqrt(1/2).   query, key, value: [B, H, N, D].

    probability_scale: [1], the step of a uniform grid over [0, largest], so largest = step (2^bits - 1).
    """
    operands = (query, query_scale), (key, key_scale), (value, value_scale)
    q, k, v = (affine.quantize(x.float(), s, 0, scheme("query", bits)).float() for x, s in operands)
    logits = (q @ k.transpose(-1, -2)) * (query_scale * key_scale * scale)  # products of integers, exact in fp32
    probabilities = round_log_sqrt2(logits.softmax(dim=-1), probability_scale * (2**bits - 1), bits)
    return ((probabilities @ v) * value_scale).to(query.dtype)


def round_log_sqrt2(probabilities: Tensor, largest: Tensor, bits: int) -> Tensor:
    """largest 2^(-q / 2) with q = clamp(round(-2 log2(p / largest)), 0, 2^bits - 1)   (RepQ-ViT, Eq. 13 to 15)."""
    ratio = (probabilities / largest).clamp(min=torch.finfo(torch.float32).tiny)
    q = (-2 * ratio.log2()).round().clamp(0, 2**bits - 1)
    return largest * torch.exp2(-q / 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] -> [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def sample_probabilities(query: Tensor, key: Tensor, heads: int, scale: float) -> Tensor:
    """Rows of softmax(q k^T scale), of 8 evenly spaced queries of each head: what calibration observes.

    query, key: [B, N, H D].   Returns [B, H, 8 at most, N].
    """
    places = torch.linspace(0, query.shape[1] - 1, min(SAMPLED_QUERIES, query.shape[1]), device=query.device).long()
    rows = split_heads(query[:, places].float(), heads)
    return (rows @ split_heads(key.float(), heads).transpose(-1, -2) * scale).softmax(dim=-1)


def attach(
    attention: Any,
    bits: int,
    scales: Mapping[str, Tensor] | None,
    device: torch.device | str,
    softmax: Softmax = "uniform",
) -> None:
    """Quantize an Attention module's two products. scales: operand -> [1] fp32; None where a file will bring them."""
    for name in OPERANDS:
        scale = torch.ones(1, device=device) if scales is None else scales[name].to(device)
        attention.register_buffer(f"{name}_scale", scale)
    attention.set_processor(QuantizedAttnProcessor(bits, softmax))


def detach(attention: Any) -> None:
    """Undo `attach`; the processor is diffusers' own again."""
    for name in OPERANDS:
        attention._buffers.pop(f"{name}_scale", None)
    attention.set_processor(AttnProcessor2_0())


def owns(module: nn.Module, leaf: str) -> bool:
    """Whether the buffer is one that `attach` registered."""
    quantized = isinstance(getattr(module, "processor", None), QuantizedAttnProcessor)
    return quantized and leaf in {f"{name}_scale" for name in OPERANDS}
