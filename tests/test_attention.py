# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from diffusers.models.attention_processor import Attention
from support import CALLS, assert_close, tiny_pipeline

import diffusers_dq as dq
from diffusers_dq import affine
from diffusers_dq.attention import (
    OPERANDS,
    QuantizedAttnProcessor,
    attach,
    round_log_sqrt2,
    sample_probabilities,
    scheme,
    split_heads,
)


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
    with torch.no_grad():
        heads = {
            name: affine.quantize(linear(x), getattr(attn, f"{name}_scale"), 0, scheme(name, 8))
            .long()
            .unflatten(-1, (2, 16))
            .transpose(1, 2)
            for name, linear in (("query", attn.to_q), ("key", attn.to_k), ("value", attn.to_v))
        }
        products = heads["query"] @ heads["key"].transpose(-1, -2)
        logits = products.float() * (attn.query_scale * attn.key_scale * attn.scale)
        q = affine.quantize(logits.softmax(-1), attn.probability_scale, -128, scheme("probability", 8))
        output = ((q.long() + 128) @ heads["value"]).float() * (attn.value_scale * attn.probability_scale)
        expected = attn.to_out[0](output.transpose(1, 2).flatten(2))
        assert torch.equal(attn(x), expected)


def test_one_graph_without_a_break():
    model, _ = quantized()
    attn = model.transformer_blocks[0].attn1
    torch._dynamo.reset()
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        compiled(torch.randn(2, 16, 32))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for tokens in (20, 33):
                x = torch.randn(2, tokens, 32)
                assert_close(compiled(x), attn(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_models_keep_their_dtype(dtype):
    model, _ = quantized()
    attn = model.transformer_blocks[0].attn1
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    expected = attn(x)
    output = attn.to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    # rounding x and the projections to 8 bits moves some of their integers by one
    assert (output - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("tokens", [64, 1024])
@torch.no_grad()
def test_flat_attention_over_many_tokens_survives_its_rounding(tokens):
    """1024 probabilities of about 1 / 1024 are all below half of 1 / 255: a fixed step would round them to nothing."""
    attention = Attention(query_dim=32, heads=2, dim_head=16).eval()
    x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0)) * 0.5
    expected = attention(x)
    query, key, value = (linear(x) for linear in (attention.to_q, attention.to_k, attention.to_v))
    observed = dict(
        zip(OPERANDS, (query, key, value, sample_probabilities(query, key, 2, attention.scale)), strict=True)
    )
    scales = {
        name: affine.affine_parameters(seen.min()[None], seen.max()[None], scheme(name, 8))[0]
        for name, seen in observed.items()
    }
    attach(attention, 8, scales, "cpu")
    error = attention(x) - expected
    # 8 bits of four operands; the fixed step gave 1.7 dB at 1024 tokens
    assert 10 * torch.log10(expected.square().mean() / error.square().mean()) > 20


def test_sampled_probabilities_are_rows_of_the_softmax():
    query, key = torch.randn(2, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    rows = sample_probabilities(query, key, 2, 0.25)
    full = (split_heads(query, 2) @ split_heads(key, 2).transpose(-1, -2) * 0.25).softmax(-1)
    assert torch.allclose(rows, full[:, :, torch.linspace(0, 15, 8).long()])  # fp32 products in another order
    assert rows.shape == (2, 2, 8, 16)


def test_the_value_projection_no_longer_carries_the_shift_of_the_output_projection():
    model, report = quantized()
    attn = model.transformer_blocks[0].attn1
    assert isinstance(attn.processor, QuantizedAttnProcessor)
    assert attn.to_out[0].input_shift is not None
    notes = {row.name: row.reason for row in report.linears}
    assert "do not sum to one" in notes["transformer_blocks.0.attn1.to_out.0"]
    assert "QK^T and AV over integers" in notes["transformer_blocks.0.attn1"]


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


@torch.no_grad()
def test_probabilities_to_powers_of_the_root_of_one_half():
    """Every value goes to the nearest power in the logarithm; what is too small for 4 bits, to the last one."""
    p = torch.tensor([1.0, 0.5, 0.7071, 0.6, 0.01, 1e-6, 0.0])
    powers = 0.5 ** (torch.arange(16) / 2)
    nearest = powers[(p.clamp(min=1e-30).log2()[:, None] - powers.log2()).abs().argmin(1)]
    assert torch.allclose(round_log_sqrt2(p, torch.ones(1), 4), nearest)
    assert torch.allclose(round_log_sqrt2(0.3 * p, torch.tensor([0.3]), 4), 0.3 * nearest)


@torch.no_grad()
def test_repq_rounds_softmax_by_its_logarithm_and_says_that_this_is_slow(tmp_path):
    pipe = tiny_pipeline()
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=4, progress=False)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    full = pipe.transformer.transformer_blocks[0].attn1(x)
    report = dq.quantize(pipe, dq.DQConfig("repq", quantize_attention=True), statistics=statistics, progress=False)
    attn = pipe.transformer.transformer_blocks[0].attn1
    assert attn.processor.softmax == "log_sqrt2"
    row = next(row for row in report.linears if row.name == "transformer_blocks.0.attn1")
    assert row.backend == "torch" and "no kernel rounds softmax to log_sqrt2" in row.reason
    assert torch.isfinite(attn(x)).all() and attn(x).shape == full.shape
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path).transformer.transformer_blocks[0].attn1
    assert again.processor.softmax == "log_sqrt2" and torch.equal(again(x), attn(x))
