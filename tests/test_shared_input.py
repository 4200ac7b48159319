# SPDX-License-Identifier: Apache-2.0
"""Query, key and value round their common input once."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from support import CALLS, assert_close, tiny_pipeline
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.shared_input import RoundedInput, SharedInput

CONFIGS = {"static": dict(method="htg", groups=3), "dynamic": dict(method="rtn", weight_bits=4)}


@pytest.fixture(scope="module")
def statistics():
    return dq.calibrate(tiny_pipeline(), CALLS, num_inference_steps=10, progress=False)


@pytest.fixture
def quantized(statistics):
    def build(kind, **more):
        model = tiny_pipeline().transformer
        dq.quantize(model, dq.DQConfig(**CONFIGS[kind], **more), statistics=statistics, progress=False)
        return model

    return build


class CountRoundings(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "quantize_" in str(function)
        return function(*args, **(kwargs or {}))


def attention_layers(model):
    attention = model.transformer_blocks[0].attn1
    return attention.to_q, attention.to_k, attention.to_v


def blocks(model):
    return len(model.transformer_blocks)


@pytest.mark.parametrize("kind", CONFIGS)
def test_three_linears_one_rounding(quantized, kind, run_dit):
    model = quantized(kind)
    with CountRoundings() as counter:
        shared = run_dit(model, (500,))
    assert counter.count == 4 * blocks(model), "q, k and v together, to_out, and the two of the feed-forward"
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module._shared_input, module._first_reader = None, ()
    with CountRoundings() as counter:
        assert torch.equal(run_dit(model, (500,)), shared)
    assert counter.count == 6 * blocks(model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_outlives_its_activation_in_grad_mode_either(quantized, kind):
    attention, x = quantized(kind).transformer_blocks[0].attn1, torch.randn(2, 3, 32, requires_grad=True) * 1
    alive = weakref.ref(x)
    attention(x)
    del x
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_compiled_graph_rounds_once_as_well(quantized, kind, run_dit):
    model, counts = quantized(kind), []

    def count(graph, _):
        counts.append(sum(node.target == torch.ops.aten.round.default for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=count))
    assert_close(run_dit(compiled, (500,)), run_dit(model, (500,)))
    assert sum(counts) == 4 * blocks(model)


def test_a_compiled_region_leaves_nothing_on_its_input(quantized):
    model = quantized("static")
    attention = model.transformer_blocks[0].attn1
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 16, attention.to_q.in_features)
    with torch.no_grad():
        for _ in range(3):
            x.normal_()
            assert_close(compiled(x), attention(x))  # an input buffer that is written to, as CUDA graphs have


def test_other_tables_are_not_shared(quantized):
    model = quantized("static", overrides={"*.to_k": dict(activation_bits=6)})
    query, key, value = attention_layers(model)
    assert value._shared_input is query._shared_input is not None and key._shared_input is None


def test_what_was_written_to_is_rounded_anew(quantized):
    model = quantized("static")
    query, key, _ = attention_layers(model)
    x = torch.randn(1, 16, query.in_features)
    with torch.no_grad():
        query(x)
        x.mul_(2)
        assert torch.equal(key(x), key(x.clone()))
        before = key(x)
        model.timestep_groups.index.fill_(2)
        assert not torch.equal(key(x), before), "the range or the bias of another group"
        assert torch.equal(key(x), key(x.clone()))


def test_inference_mode_computes_the_same(quantized, run_dit):
    model = quantized("static")
    expected = run_dit(model, (500,))
    with torch.inference_mode():
        assert torch.equal(run_dit(model, (500,)), expected)


def test_kept_no_longer_than_the_activation():
    shared, group = SharedInput(), torch.zeros(1, dtype=torch.long)
    first, second = torch.randn(2, 4), torch.randn(2, 4)
    rounded = RoundedInput(torch.zeros(2, 4, dtype=torch.int8), None)
    shared.keep(first, group, rounded, 8)
    assert shared.find(first, group, 8) is rounded and shared.find(second, group, 8) is None
    shared.keep(second, group, rounded, 8)
    del first
    gc.collect()
    assert shared.find(second, group, 8) is rounded, "the end of an older activation changes nothing"
    del second
    gc.collect()
    assert shared._kept is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_within_itself(quantized, duplicate, run_dit):
    model = quantized("static")
    expected = run_dit(model, (500,))
    twin = duplicate(model)
    assert torch.equal(run_dit(twin, (500,)), expected)
    (query, key, _), (ours, _, _) = attention_layers(twin), attention_layers(model)
    assert query._shared_input is key._shared_input is not ours._shared_input
    assert key._first_reader == (query,)
