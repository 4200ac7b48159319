# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from support import CALLS, tiny_pipeline

import diffusers_dq as dq
from diffusers_dq import affine
from diffusers_dq.attention import QuantizedAttnProcessor


def quantized(**options):
    pipe = tiny_pipeline()
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=4, progress=False)
    config = dq.DQConfig("htg", quantize_attention=True, **options)
    report = dq.quantize(pipe, config, statistics=statistics, progress=False)
    return pipe.transformer, report


def test_products_are_those_of_integers():
    """The fp32 matrix products against int64 ones on the same integers: equal, not close."""
    model, _ = quantized()
    attn = model.transformer_blocks[0].attn1
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    scheme = attn.processor.scheme
    with torch.no_grad():
        heads = {
            name: affine.quantize(linear(x), getattr(attn, f"{name}_scale"), 0, scheme)
            .long()
            .unflatten(-1, (2, 16))
            .transpose(1, 2)
            for name, linear in (("query", attn.to_q), ("key", attn.to_k), ("value", attn.to_v))
        }
        products = heads["query"] @ heads["key"].transpose(-1, -2)
        logits = products.float() * (attn.query_scale * attn.key_scale * attn.scale)
        levels = affine.quantize_probability(logits.softmax(-1), 8).long()
        output = (levels @ heads["value"]).float() * (attn.value_scale / 255)
        expected = attn.to_out[0](output.transpose(1, 2).flatten(2))
        assert torch.equal(attn(x), expected)


def test_the_value_projection_no_longer_carries_the_shift_of_the_output_projection():
    model, report = quantized()
    attn = model.transformer_blocks[0].attn1
    assert isinstance(attn.processor, QuantizedAttnProcessor)
    assert attn.to_out[0].input_shift is not None
    notes = {row.name: row.reason for row in report.linears}
    assert "do not sum to one" in notes["transformer_blocks.0.attn1.to_out.0"]


def test_what_it_needs_is_said():
    with pytest.raises(ValueError, match="rounds to activation_bits, which is 16"):
        dq.DQConfig("htg", activation_bits=16, quantize_attention=True)
    with pytest.raises(ValueError, match="needs statistics"):
        dq.quantize(tiny_pipeline(), dq.DQConfig("rtn", quantize_attention=True), progress=False)


def test_masked_and_cross_attention_are_refused():
    model, _ = quantized()
    attn = model.transformer_blocks[0].attn1
    with pytest.raises(ValueError, match="self-attention without a mask"):
        attn(torch.zeros(1, 4, 32), encoder_hidden_states=torch.zeros(1, 3, 32))
