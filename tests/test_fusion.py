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
    "rotated": dict(method="quarot"),
    "rotated static": dict(method="quarot", dynamic=False),
    "groups of weights": dict(method="qdit", weight_bits=4, activations="token", group_size=32),
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


@pytest.mark.parametrize("part", range(6), ids=["shift", "scale", "gate", "MLP shift", "MLP scale", "MLP gate"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_every_part_of_a_large_modulation(kind, part, quantized):
    """One block in which each part weighs: without it the output is another."""
    block = quantized(kind).transformer_blocks[0]
    torch.manual_seed(0)
    modulation = torch.nn.Linear(32, 6 * 32).requires_grad_(False)
    modulation.bias.normal_()
    block.norm1.linear = modulation
    call = dict(
        hidden_states=torch.randn(2, 16, 32), timestep=torch.tensor([500, 500]), class_labels=torch.tensor([1, 2])
    )
    plain = copy.deepcopy(block)
    fusion.unfuse(plain)
    with torch.no_grad():
        fused, expected = block(**call), plain(**call)
        plain.norm1.linear.bias[32 * part : 32 * (part + 1)] += 1
        other = plain(**call)
    assert_close(fused, expected)
    assert (other - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("bits", [dict(weight_bits=16, activation_bits=16), dict(weight_bits=8, activation_bits=16)])
def test_what_does_not_round_is_left_to_diffusers(bits, quantized, run_dit):
    count, _ = fused_norms(run_dit, quantized("dynamic", **bits))
    assert count == 0


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_block_rounds_four_times(kind, quantized, run_dit):
    """Also under inference_mode, whose tensors do not count their writes and so are not kept for other readers."""
    model = quantized(kind, torch.bfloat16)
    blocks = len(model.transformer_blocks)
    with torch.inference_mode(), Ops() as ops:
        run_dit(model, (500,))
    rounding = [name for name in ops.names if "quantize" in name]
    others = [name for name in rounding if not name.startswith("norm_quantize")]
    assert (len(rounding), len(others)) == (4 * blocks, 2 * blocks)


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
        lambda block: setattr(block, "norm3", torch.nn.RMSNorm(32)),
        lambda block: setattr(block, "ff", torch.nn.Sequential(block.ff, torch.nn.Tanh())),
    ],
    ids=[
        "chunks",
        "norm hook",
        "linear hook",
        "replaced forward",
        "training",
        "another GELU",
        "another linear",
        "another norm",
        "another MLP",
    ],
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


@pytest.mark.parametrize(
    "change",
    [
        lambda attn: setattr(attn, "rescale_output_factor", 2.0),
        lambda attn: setattr(attn, "residual_connection", True),
        lambda attn: setattr(attn, "norm_q", torch.nn.RMSNorm(16, eps=1e-4)),
        lambda attn: attn.to_out.__setitem__(1, torch.nn.ReLU()),
        lambda attn: attn.register_forward_hook(lambda _, __, output: 2 * output),
        lambda attn: attn.to_out[1].register_forward_hook(lambda _, __, output: 2 * output),
        lambda attn: attn.to_v.register_forward_hook(lambda _, __, output: 2 * output),
        lambda attn: attn.to_out[0].register_forward_hook(lambda _, __, output: 2 * output),
    ],
    ids=["rescaled", "residual", "norm of queries", "activation", "hook", "dropout's hook", "to_v's", "to_out's"],
)
def test_attention_does_what_its_module_does(change, quantized, run_dit):
    model = quantized("static")
    before = run_dit(model, (500,))
    change(model.transformer_blocks[0].attn1)
    plain = copy.deepcopy(model)
    fusion.unfuse(plain)
    count, output = fused_norms(run_dit, model)
    assert count == 2 * len(model.transformer_blocks), "the rest of the block stays fused"
    assert_close(output, run_dit(plain, (500,)))
    assert (output - before).norm() > 5e-3 * before.norm(), "the change matters"


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_backward_through_a_fused_block_is_refused(kind, quantized):
    """Not left without a part of the gradient: the residual alone would give one."""
    block = quantized(kind).transformer_blocks[0]
    hidden_states = torch.randn(2, 16, 32, requires_grad=True)
    output = block(hidden_states, timestep=torch.tensor([500, 500]), class_labels=torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="has no gradient: quantized layers are for inference"):
        output.sum().backward()


def test_a_mask_reaches_attention(quantized):
    block = quantized("static").transformer_blocks[0]
    torch.manual_seed(0)
    call = dict(
        hidden_states=torch.randn(2, 16, 32), timestep=torch.tensor([500, 500]), class_labels=torch.tensor([1, 2])
    )
    mask = torch.zeros(2, 1, 16)
    mask[..., 8:] = -1e4
    plain = copy.deepcopy(block)
    fusion.unfuse(plain)
    with torch.no_grad():
        masked, free, expected = block(**call, attention_mask=mask), block(**call), plain(**call, attention_mask=mask)
    assert_close(masked, expected)
    assert (masked - free).norm() > 1e-2 * free.norm()


def test_global_hooks_see_every_module(quantized, run_dit):
    """Profilers and FLOP counters hook into all modules at once."""
    model = quantized("static")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        count, _ = fused_norms(run_dit, model)
    finally:
        handle.remove()
    assert count == 0


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
