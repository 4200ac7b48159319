# SPDX-License-Identifier: Apache-2.0
"""HiDream-I1 (HiDream.ai, 2025) as diffusers' HiDreamImageTransformer2DModel: a sparse mixture of experts.

Blocks of two streams, then of one; the modulation linear of a block, `adaLN_modulation.1`, emits shift, scale, gate of
the attention, then of the feed-forward, for the picture, and in two-stream blocks the same again for the text.
A router sends each token of the picture to two of four gated feed-forwards, beside a shared one. The router reads the
modulated norm with a weight that is no linear, so nothing may change what the norm puts out; each expert reads tokens
of its own. Text, and models without experts, have one gated feed-forward that reads the norm alone.
diffusers runs the experts without gradients: AdaRound learns nothing of their weights, which go to the nearest.
"""

from typing import Any

from torch import nn

from diffusers_dq.specs.base import SPECS, LinearGroup, ModelSpec, ModulatedNorm, TimestepRange
from diffusers_dq.specs.blocks import alone, block_names, feed_forward, self_attention

_GATED = ("w1", "w3", "w2")


@SPECS.register("HiDreamImageTransformer2DModel")
def hidream(model: nn.Module) -> ModelSpec:
    blocks = [f"{name}.block" for name in block_names(model, "double_stream_blocks", "single_stream_blocks")]
    return ModelSpec(
        groups=tuple(group for block in blocks for group in _block_groups(block, model.get_submodule(block))),
        not_converted=("t_embedder", "p_embedder", "x_embedder", "caption_projection", "final_layer"),
        weight_only=frozenset(f"{block}.adaLN_modulation.1" for block in blocks),
        timestep=TimestepRange("timesteps"),
    )


def _block_groups(block: str, module: Any) -> list[LinearGroup]:
    modulation, attention = f"{block}.adaLN_modulation.1", f"{block}.attn1"
    single, experts = module.attn1.single, getattr(module.ff_i, "experts", None)
    groups = [*alone(modulation), *self_attention(attention, ModulatedNorm(modulation), carries=single, out="to_out")]
    if experts is None:
        groups += feed_forward(f"{block}.ff_i", ModulatedNorm(modulation, chunks=((3, 4),)), _GATED)
    else:
        names = ("shared_experts", *(f"experts.{i}" for i in range(len(experts))))
        groups += [group for name in names for group in feed_forward(f"{block}.ff_i.{name}", linears=_GATED)]
    if not single:
        text = tuple(f"{attention}.to_{letter}_t" for letter in "qkv")
        groups.append(LinearGroup(text, ModulatedNorm(modulation, chunks=((6, 7),))))
        groups += alone(f"{attention}.to_out_t")
        groups += feed_forward(f"{block}.ff_t", ModulatedNorm(modulation, chunks=((9, 10),)), _GATED)
    return groups
