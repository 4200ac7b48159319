# SPDX-License-Identifier: Apache-2.0
"""What takes part in a step: full precision, ours and the peers', each made of the same weights."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, ModelMixin
from torch import Tensor, nn

import diffusers_dq as dq
from diffusers_dq.benchmark.models import Case
from diffusers_dq.benchmark.peers import sdnq_int8, torchao_float8, torchao_int8
from diffusers_dq.benchmark.roofline import LinearCall

CALIBRATION_STEPS = 8
NOTE = (
    f"random weights; HTG calibrated for {CALIBRATION_STEPS} steps with min-max ranges and 4 timestep groups:"
    " speed does not depend on the values. torchao on a GPU: linears of more than 16 rows"
)


@dataclass(frozen=True)
class Source:
    """The model that every contestant is made of.

    full: fp32, on the CPU alone.   half: its bf16 copy.   statistics: of a DiT.   linears: the calls of one step.
    reference: what half puts out.
    """

    case: Case
    full: ModelMixin | None
    half: ModelMixin
    statistics: dq.Statistics | None
    linears: Sequence[LinearCall]
    reference: Tensor

    @property
    def rows(self) -> dict[str, int]:
        """Linear -> rows of its input."""
        return {call.name: call.m for call in self.linears}


@dataclass(frozen=True)
class Variant:
    """build: a model for the step. Raises what its library raises where it cannot.
    families: of models it is for, None for all.   cpu_only: on a GPU it says nothing.
    """

    name: str
    kind: Literal["baseline", "ours", "peer"]
    build: Callable[[Source], nn.Module]
    families: tuple[str, ...] | None = None
    cpu_only: bool = False
    dtype: torch.dtype = torch.bfloat16

    def takes_part(self, case: Case, device: str) -> bool:
        return (self.families is None or case.family in self.families) and (device == "cpu" or not self.cpu_only)


def throwaway_pipeline(model: ModelMixin, device: str) -> DiTPipeline:
    """Around a DiT, with a VAE that only has to be there."""
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval().to(device)
    pipe = DiTPipeline(model, vae.bfloat16() if model.dtype == torch.bfloat16 else vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calibrated(model: ModelMixin, device: str) -> dq.Statistics:
    calls = [dict(class_labels=[1], guidance_scale=1.5)]
    pipe = throwaway_pipeline(model, device)
    return dq.calibrate(pipe, calls, num_inference_steps=CALIBRATION_STEPS, progress=False)


def _full(source: Source) -> nn.Module:
    if source.full is None:
        raise ValueError("the fp32 weights are no longer there; the fp32 contestant is for the CPU")
    return source.full


def _htg(bits: int) -> Callable[[Source], nn.Module]:
    def build(source: Source) -> nn.Module:
        model = copy.deepcopy(source.half)
        config = dq.DQConfig("htg", weight_bits=bits, groups=4, search="minmax")
        dq.quantize(model, config, statistics=source.statistics, progress=False)
        return model

    return build


def _rtn(bits: int) -> Callable[[Source], nn.Module]:
    def build(source: Source) -> nn.Module:
        model = copy.deepcopy(source.half)
        dq.quantize(model, dq.DQConfig("rtn", weight_bits=bits), progress=False)
        return model

    return build


def _peer(convert: Callable[[nn.Module, Mapping[str, int]], nn.Module]) -> Callable[[Source], nn.Module]:
    return lambda source: convert(copy.deepcopy(source.half), source.rows)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("bf16", "baseline", lambda source: source.half),
        Variant("fp32", "baseline", _full, cpu_only=True, dtype=torch.float32),
        Variant("HTG W8A8 static", "ours", _htg(8), families=("dit",)),
        Variant("HTG W4A8 static", "ours", _htg(4), families=("dit",)),
        Variant("RTN W8A8 dynamic", "ours", _rtn(8)),
        Variant("RTN W4A8 dynamic", "ours", _rtn(4)),
        Variant("torchao int8 dynamic", "peer", _peer(torchao_int8)),
        Variant("torchao float8 row", "peer", _peer(torchao_float8)),
        Variant("SDNQ int8", "peer", _peer(sdnq_int8)),
    )
}


def variants_of(names: tuple[str, ...] | None) -> list[Variant]:
    """Of these names, bf16 always among them; None is all. Raises ValueError for an unknown name."""
    if names is None:
        return list(VARIANTS.values())
    unknown = set(names) - set(VARIANTS)
    if unknown:
        raise ValueError(f"no contestant named {', '.join(sorted(unknown))}; known: {', '.join(VARIANTS)}")
    return [variant for name, variant in VARIANTS.items() if name == "bf16" or name in names]
