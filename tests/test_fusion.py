# SPDX-License-Identifier: Apache-2.0
"""Fused blocks compute what diffusers' own compute, and step aside where they would not."""

import copy

import pytest
import torch
from support import CALLS, assert_close, tiny_dit, tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

import diffusers_dq as dq
from diffusers_dq import fusion

CONFIGS = {
    "static": dict(method="htg", groups=3),
    "dynamic": dict(method="rtn"),
    "online": dict(method="htg", groups=3, online=True, weight_bits=4, ranges="group"),
}


@pytest.fixture(scope="module")
def statistics():
    return dq.calibrate(tiny_pipeline(), CALLS, num_inference_steps=10, progress=False)


@pytest.fixture
def quantized(statistics):
    def build(kind, dtype=torch.float32, **more):
        model = tiny_pipeline().transformer.to(dtype)
        dq.quantize(model, dq.DQConfig(**CONFIGS[kind], **more), statistics=statistics, progress=False)
        return model

    return build


class Ops(TorchDispatchMode):
    """Names of our ops in the order they ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = str(function).partition(".")
        if namespace == "diffusers_dq":
            self.names.append(name.removesuffix(".default"))
        return function(*args, **(kwargs or {}))


def fused_norms(run, model):
    with Ops() as ops:
        output = run(model, (500,))
    return sum(name.startswith("norm_quantize") for name in ops.names), output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_fused_block_computes_what_diffusers_computes(quantized, run_dit, kind, dtype):
    model = quantized(kind, dtype)
    count, fused = fused_norms(run_dit, model)
    assert count == 2 * len(model.transformer_blocks)
    plain = copy.deepcopy(model)
    fusion.unfuse(plain)
    count, expected = fused_norms(run_dit, plain)
    assert count == 0
    # diffusers rounds to bf16 after each operation, the kernels once: a few eps
    assert_close(fused, expected, flips=0.02 if dtype == torch.bfloat16 else 2e-3)


def test_what_does_not_round_is_left_to_diffusers(quantized, run_dit):
    model = quantized("static", weight_bits=16, activation_bits=16)
    count, _ = fused_norms(run_dit, model)
    assert count == 0


class _Processor:
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return attn.to_out[0](attn.to_v(hidden_states) + attn.to_q(hidden_states) + hidden_states)


def test_a_custom_attention_processor_gets_the_activation_itself(quantized, run_dit):
    model = quantized("static")
    plain = copy.deepcopy(model)
    fusion.unfuse(plain)
    for either in (model, plain):
        either.transformer_blocks[0].attn1.set_processor(_Processor())
    fused, expected = run_dit(model, (500,)), run_dit(plain, (500,))
    assert_close(fused, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "_chunk_size", 1),
        lambda block: block.norm3.register_forward_hook(lambda *_: None),
        lambda block: block.ff.net[2].register_forward_pre_hook(lambda *_: None),
        lambda block: setattr(block.ff.net[0].proj, "forward", block.ff.net[0].proj.forward),
        lambda block: setattr(block, "training", True),
        lambda block: setattr(block.ff.net[0], "approximate", "none"),
        lambda block: block.ff.net.__setitem__(2, torch.nn.Linear(128, 32)),
    ],
    ids=["chunks", "norm hook", "linear hook", "replaced forward", "training", "another GELU", "another linear"],
)
def test_steps_aside_for(change, quantized, run_dit):
    model = quantized("static")
    torch.manual_seed(0)
    change(model.transformer_blocks[0])
    plain = copy.deepcopy(model)
    fusion.unfuse(plain)
    count, output = fused_norms(run_dit, model)
    assert count == 2 * (len(model.transformer_blocks) - 1)
    expected = run_dit(plain, (500,))
    assert_close(output, expected)
    torch._dynamo.reset()
    assert_close(run_dit(torch.compile(model, fullgraph=True, backend="aot_eager"), (500,)), expected)


def test_hooks_still_see_every_linear(quantized, run_dit):
    model, seen = quantized("static"), []
    model.transformer_blocks[0].ff.net[0].proj.register_forward_hook(lambda *_: seen.append(1))
    run_dit(model, (500,))
    assert seen == [1]


def test_dequantizing_gives_the_blocks_back(run_dit):
    model = tiny_dit()
    dq.quantize(model, dq.DQConfig("rtn"), progress=False)
    assert all("forward" in vars(block) for block in model.transformer_blocks)
    model.dequantize()
    assert not any("forward" in vars(block) for block in model.transformer_blocks)
    assert run_dit(model, (500,)).isfinite().all()
