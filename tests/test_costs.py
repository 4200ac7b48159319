# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny_dit

import diffusers_dq as dq
from diffusers_dq.costs import Choice, bitops, legal_group_sizes
from diffusers_dq.search.trial import Trial, layers_of


def test_legal_group_sizes_are_the_divisors_that_are_multiples_of_32():
    assert legal_group_sizes(1152) == (32, 64, 96, 128, 192, 288, 384, 576, 1152)
    assert legal_group_sizes(4608, (256, 512, 100, 1536)) == (256, 512, 1536)
    assert legal_group_sizes(72) == ()


@given(st.integers(1, 40), st.integers(1, 5000), st.integers(1, 300), st.sampled_from([4, 8]))
def test_bitops_fall_as_groups_grow(multiple, out_features, tokens, bits):
    sizes = legal_group_sizes(multiple * 96)
    counts = [bitops(out_features, multiple * 96, tokens, bits, 8, size) for size in sizes]
    assert all(a > b for a, b in zip(counts, counts[1:], strict=False))
    assert counts[-1] == bitops(out_features, multiple * 96, tokens, bits, 8)  # one group is one scale a row


def test_bitops_are_products_of_bits_and_a_float_multiplication_a_group():
    assert bitops(2, 64, 3, 4, 8, 32) == 3 * 2 * (64 * 4 * 8 + 2 * 32 * 32)


@pytest.mark.parametrize("method", ["rtn", "qdit", "quarot"])
@pytest.mark.parametrize("choice", [Choice(4, 8), Choice(4, 8, 32), Choice(6, 8), Choice(8, 8, 32), Choice(4, 8, 64)])
def test_bits_counted_are_bits_in_the_file(method, choice):
    model = tiny_dit(num_attention_heads=4)
    config = dq.DQConfig(method, modules_to_not_convert=["norm1", "proj_out"])
    names = [layer.name for layer in layers_of(model, config, None)]
    trial = Trial(model, config, None, {name: [choice] for name in names})
    dq.quantize(model, config.copy(overrides={name: choice.override for name in names}), progress=False)
    for name in names:
        layer = model.get_submodule(name)
        stored = [layer.weight, layer.weight_scale, layer.weight_zero_point]
        nbytes = sum(tensor.nbytes for tensor in stored if tensor is not None)
        packed = nbytes - (layer.weight.nbytes // 4 if choice.weight_bits == 6 else 0)  # a file packs 6 bits
        assert trial.stored_bits(name, choice) == 8 * packed


def test_an_unrounded_weight_takes_what_its_dtype_takes():
    model = tiny_dit().to(torch.bfloat16)
    choice, name = Choice(16, 16), "transformer_blocks.0.ff.net.2"
    assert Trial(model, dq.DQConfig("rtn"), None, {name: [choice]}).stored_bits(name, choice) == 32 * 128 * 16
