# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks that round where a value is made, instead of writing it out and reading it back.

diffusers' blocks normalise, modulate, activate, gate and add in operations of their own, and each goes over memory. A
fused forward computes the same from the same modules and parameters, on kernels that do all of it while they round.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import diffusers_dq_kernels as ops
from diffusers_dq.attention import split_heads
from diffusers_dq.linear import QuantizedLinear

# Dynamo traces the function, not the class's attribute.
_unfused: Callable[..., Tensor] = BasicTransformerBlock.forward


def fuse(model: nn.Module) -> None:
    """Give every block that has a fused forward that forward. It falls back to the block's own where it must."""
    for module in model.modules():
        if _is_adaln_zero(module) and "forward" not in vars(module):
            module.forward = partial(_adaln_zero_block, module)  # not a method: pickle finds those by their name


def unfuse(model: nn.Module) -> None:
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func is _adaln_zero_block:
            del module.forward


def _is_adaln_zero(module: nn.Module) -> bool:
    return type(module) is BasicTransformerBlock and module.norm_type == "ada_norm_zero"


def _adaln_zero_block(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """DiT's block: LN, modulate, attention, gate, add; LN, modulate, GELU MLP, gate, add.

    hidden_states: [B, T, C].   Arguments as in BasicTransformerBlock.forward.
    """
    if not _fuses(block, hidden_states, kwargs) or args:
        return _unfused(block, hidden_states, *args, **kwargs)
    embedding = block.norm1.emb(kwargs["timestep"], kwargs["class_labels"], hidden_dtype=hidden_states.dtype)
    modulation = block.norm1.linear(block.norm1.silu(embedding))  # [B, 6 C]
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)

    x = block.attn1.to_q.shared_norm(hidden_states, block.norm1.norm, scale_msa, shift_msa)
    mask = kwargs.get("attention_mask")
    if mask is None and _is_plain(block.attn1):
        hidden_states = _self_attention(block.attn1, x, gate_msa[:, None], hidden_states)
    else:
        hidden_states = torch.addcmul(hidden_states, gate_msa[:, None], block.attn1(x, attention_mask=mask))

    up, down, dtype = block.ff.net[0].proj, block.ff.net[2], hidden_states.dtype
    rounded = up.rounded_norm(hidden_states, block.norm3, scale_mlp, shift_mlp)
    activated = up.product(rounded, _dtype_between(hidden_states), activation="gelu_tanh")
    return down.product(down.rounded(activated), dtype, gate=gate_mlp[:, None], residual=hidden_states)


def _self_attention(attn: Any, x: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """residual + gate * attn(x), on [B, T, C]."""
    heads = (split_heads(project(x), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
    merged = ops.dot_product_attention(*heads).transpose(1, 2).flatten(2)
    output = attn.to_out[0]
    if _rounds(output):
        return output.product(output.rounded(merged), x.dtype, gate=gate, residual=residual)
    return torch.addcmul(residual, gate, output(merged))


def _is_plain(attn: Any) -> bool:
    """Whether nothing comes between projections, softmax(q k^T / sqrt(D)) v and the output's projection."""
    return (
        type(attn.processor) is AttnProcessor2_0
        and _unhooked(attn)
        and not any((attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.residual_connection))
        and attn.rescale_output_factor == 1
        and type(attn.to_out[1]) is nn.Dropout
        and not attn.to_out[1].training
        and _unhooked(attn.to_out[1])
    )


def _fuses(block: Any, hidden_states: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the fused forward computes what the block's own would: no part replaced, hooked or used otherwise."""
    given = {name for name, value in kwargs.items() if value is not None}
    if type(block.ff) is not FeedForward or type(block.norm1) is not AdaLayerNormZero or _has_any_global_hook():
        return False
    up, *others = block.ff.net
    dropouts = [module for module in others if type(module) is not QuantizedLinear]
    return (
        given <= {"attention_mask", "timestep", "class_labels"}
        and {"timestep", "class_labels"} <= given
        and hidden_states.ndim == 3
        and block.attn2 is None
        and block.pos_embed is None
        and block._chunk_size is None
        and not block.training
        and block.norm1.emb is not None
        and type(block.norm1.norm) is type(block.norm3) is nn.LayerNorm
        and type(block.attn1) is Attention
        and all(type(module) is nn.Dropout and not module.training for module in dropouts)
        and type(up) is GELU
        and up.approximate == "tanh"
        and all(_rounds(linear) for linear in (block.attn1.to_q, up.proj, block.ff.net[2]))
        and all(map(_unhooked, (block.norm1, block.norm1.norm, block.norm3, block.ff, up, *dropouts)))
    )


def _dtype_between(x: Tensor) -> torch.dtype:
    """Of an activation that is rounded as soon as it is made.

    Inductor never writes it out on a CPU, and vectorises the loop that makes and rounds it for the widest or the
    narrowest float it meets: with a bf16 in it, int8 is converted element by element (2.1 ms instead of 0.8 for
    512 x 4608).
    """
    return torch.float32 if torch.compiler.is_compiling() and x.device.type == "cpu" else x.dtype


def _rounds(linear: nn.Module) -> bool:
    if type(linear) is not QuantizedLinear or not _unhooked(linear):
        return False
    layout = linear.layout
    return linear.rounds_input and layout.input_rounding in ("static", "token") and not layout.low_rank


def _unhooked(module: nn.Module) -> bool:
    """Whether calling the module is no more than its forward: offloading and observers hook in."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
