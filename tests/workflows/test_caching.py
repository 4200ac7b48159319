# SPDX-License-Identifier: Apache-2.0
"""diffusers' step caches on a model that switches groups with the timestep."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_pyramid_attention_broadcast
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from support import CALLS, PIXART_CALL, assert_close, tiny_pipeline, tiny_pixart_pipeline

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear

STEPS = 6
HTG = dq.DQConfig("htg", groups=3, online=True)


@pytest.fixture(scope="module")
def flux_call() -> dict[str, Any]:
    seed = torch.Generator().manual_seed(0)
    return dict(
        prompt_embeds=torch.randn(1, 4, 32, generator=seed),
        pooled_prompt_embeds=torch.randn(1, 32, generator=seed),
        height=64,
        width=64,
        output_type="latent",
    )


@pytest.fixture(scope="module")
def pipes(tiny_flux, flux_call) -> dict[str, Any]:
    """Calibrated and quantized, by name. Three blocks of each kind: caches leave the first and the last alone."""
    return {
        "dit": made(tiny_pipeline(num_layers=3), CALLS[0]),
        "pixart": made(tiny_pixart_pipeline(), PIXART_CALL),
        "flux": made(tiny_flux(), flux_call),
    }


def made(pipe: Any, call: dict[str, Any]) -> Any:
    pipe.set_progress_bar_config(disable=True)
    dq.quantize(pipe, HTG, calls=[call], num_inference_steps=STEPS, progress=False)
    return pipe


@pytest.fixture
def run(flux_call) -> Callable[[Any], tuple[torch.Tensor, list[Any], int]]:
    """A function: what a pipeline makes of a seed, the groups it went through, and how often linears were called."""

    def generate(pipe: Any) -> tuple[torch.Tensor, list[Any], int]:
        groups: list[Any] = []
        calls: list[Any] = []
        model = pipe.transformer
        hooks = [model.register_forward_hook(lambda module, *_: groups.append(module.timestep_groups.index.tolist()))]
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                hooks.append(module.register_forward_hook(lambda *_: calls.append(1)))
        call = {"FluxPipeline": flux_call, "DiTPipeline": CALLS[0], "PixArtSigmaPipeline": PIXART_CALL}
        arguments = {"output_type": "np"} | call[type(pipe).__name__]
        seed = torch.Generator().manual_seed(0)
        images = pipe(**arguments, num_inference_steps=STEPS, generator=seed).images
        for hook in hooks:
            hook.remove()
        return torch.as_tensor(images), groups, len(calls)

    return generate


def attention_broadcast(pipe: Any, skip: int) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )


CACHES = {
    "first block": lambda pipe, active: FirstBlockCacheConfig(threshold=10.0 if active else 0.0),
    "pyramid": lambda pipe, active: attention_broadcast(pipe, 3 if active else 1),
    "mag": lambda pipe, active: MagCacheConfig(
        threshold=10.0 if active else 0.0, num_inference_steps=STEPS, mag_ratios=torch.full((STEPS,), 0.9)
    ),
    "taylor": lambda pipe, active: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1 if active else STEPS, taylor_factors_dtype=torch.float32
    ),
    "faster": lambda pipe, active: FasterCacheConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 700 if active else 0),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: float(pipe.current_timestep),
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BFCHW",
        is_guidance_distilled=True,
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_of_flux(pipes, run, name):
    """One that never skips changes no bit; one that skips calls fewer linears, and the groups go on switching."""
    pipe = pipes["flux"]
    expected, groups, calls = run(pipe)
    assert len(groups) == STEPS and len({str(index) for index in groups}) > 1
    for active in (False, True):
        pipe.transformer.enable_cache(CACHES[name](pipe, active))
        cached, went_through, called = run(pipe)
        pipe.transformer.disable_cache()
        assert went_through == groups
        assert torch.equal(cached, expected) != active
        assert (called < calls) == active
        assert torch.isfinite(cached).all()
    assert torch.equal(run(pipe)[0], expected)


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_attention_broadcast_on_classes_without_enable_cache(pipes, run, name):
    pipe = pipes[name]
    assert not hasattr(pipe.transformer, "enable_cache")
    expected, groups, calls = run(pipe)
    for active in (False, True):
        apply_pyramid_attention_broadcast(pipe.transformer, attention_broadcast(pipe, 3 if active else 1))
        cached, went_through, called = run(pipe)
        for module in pipe.transformer.modules():
            registry = getattr(module, "_diffusers_hook", None)
            if registry is not None:
                assert any(isinstance(hook, PyramidAttentionBroadcastHook) for hook in registry.hooks.values())
                registry.remove_hook("pyramid_attention_broadcast", recurse=False)
        assert went_through == groups
        assert (called < calls) == active
        if not active:
            assert_close(cached, expected)  # DiT's fused block stands back
        else:
            assert not torch.equal(cached, expected)
    assert torch.equal(run(pipe)[0], expected)
