# SPDX-License-Identifier: Apache-2.0
"""GPTQ against its own equations, restated with explicit inverses, and against rounding to nearest."""

import pytest
import torch

from diffusers_dq import affine
from diffusers_dq.gptq import quantize_weight_gptq
from diffusers_dq.scheme import QuantScheme

CHANNEL = QuantScheme(bits=4, granularity="channel")
GROUP = QuantScheme(bits=4, granularity="group", group_size=32)
ASYMMETRIC = QuantScheme(bits=4, granularity="group", group_size=32, symmetric=False)
SCHEMES = [CHANNEL, GROUP, ASYMMETRIC]


def problem(n=12, k=64, rows=400, seed=0):
    """Weight [N, K] and inputs [rows, K] whose channels have much in common."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) * torch.linspace(1, 0.05, k)[:, None]
    return torch.randn(n, k, generator=generator), torch.randn(rows, k, generator=generator) @ mixing


def error(weight, quantized, x):
    return float((x @ (weight - quantized.dequantized()).T).norm())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_the_output_is_closer_than_by_rounding_to_nearest(scheme, seed):
    weight, x = problem(seed=seed)
    nearest, gptq = affine.quantize_weight(weight, scheme), quantize_weight_gptq(weight, x.T @ x, scheme)
    assert error(weight, gptq, x) < 0.8 * error(weight, nearest, x)
    assert (gptq.dequantized() - weight).norm() > (nearest.dequantized() - weight).norm(), "not for the weight's sake"


def plain_gptq(weight, hessian, scheme, damping):
    """Eq. 2 and 3 column by column, the inverse of what is left worked out anew for each."""
    w, k = weight.double().clone(), weight.shape[1]
    h = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(k)
    size = scheme.group_size or k
    out = torch.empty_like(w)
    for i in range(k):
        if i % size == 0:
            scale, zero_point = affine.weight_ranges(w[:, i : i + size].float(), scheme, "minmax")
        inverse = torch.linalg.inv(h[i:, i:])
        q = affine.quantize(w[:, i].float(), scale, zero_point, scheme)
        out[:, i] = affine.dequantize(q, scale, zero_point)
        w[:, i:] -= ((w[:, i] - out[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("block", [1, 7, 128])
def test_blocks_and_factors_change_nothing(scheme, block):
    weight, x = problem(k=64)
    hessian = x.T @ x
    expected = plain_gptq(weight, hessian, scheme, damping=0.01)
    found = quantize_weight_gptq(weight, hessian, scheme, block=block).dequantized()
    # a value that lies at a half goes either way in fp32, and takes the rest of its row along
    same = (found - expected).abs().amax(1) < 1e-4 * weight.abs().max()
    assert same.float().mean() >= 0.75


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_inputs_without_anything_in_common_leave_rounding_to_nearest(scheme):
    weight, _ = problem()
    gptq = quantize_weight_gptq(weight, torch.diag(torch.rand(64) + 0.5), scheme)
    assert torch.equal(gptq.integers, affine.quantize_weight(weight, scheme).integers)


def test_dead_and_too_few_inputs():
    """Fewer inputs than channels leave H singular, a dead channel a zero on its diagonal: damping serves both."""
    weight, x = problem(rows=10)
    x[:, 5] = 0
    gptq = quantize_weight_gptq(weight, x.T @ x, CHANNEL)
    assert torch.isfinite(gptq.dequantized()).all()
    assert error(weight, gptq, x) < error(weight, affine.quantize_weight(weight, CHANNEL), x)


@pytest.mark.parametrize("hessian", [torch.eye(63), torch.full((64, 64), float("nan"))], ids=["size", "NaN"])
def test_a_hessian_that_does_not_fit_is_an_error(hessian):
    with pytest.raises(ValueError, match=r"hessian must be finite and \[64, 64\]"):
        quantize_weight_gptq(problem()[0], hessian, CHANNEL)


def test_a_hessian_that_sums_in_fp32_have_left_indefinite_is_damped_until_it_is_not():
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) + 1000
    hessian = (x.T @ x).double() - torch.outer(x.sum(0), x.sum(0)).double() / len(x)
    assert torch.linalg.eigvalsh(hessian).min() < 0, "cancellation"
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    found = quantize_weight_gptq(weight, hessian, QuantScheme(bits=4, granularity="channel"))
    assert torch.isfinite(found.dequantized()).all()
    with pytest.raises(ValueError, match="far from positive semidefinite"):
        quantize_weight_gptq(weight, 100 - 99 * torch.eye(8), QuantScheme(bits=4, granularity="channel"))


def test_the_scale_of_the_hessian_does_not_matter_also_with_dead_inputs():
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    scheme = QuantScheme(bits=4, granularity="channel")
    small, large = (quantize_weight_gptq(weight, factor * x.T @ x, scheme).integers for factor in (1e-6, 1e6))
    assert torch.equal(small, large)
