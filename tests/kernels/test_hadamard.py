# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from exact_rounding import Bounded, exact_transform
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_dq_kernels import _quantize_rows, quantize
from diffusers_dq_kernels._input_transform import InputTransform
from diffusers_dq_kernels._rounding import Rounded
from diffusers_dq_kernels.hadamard import check_order, hadamard_matrix, rotate, rotation_order, split_order

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

POWERS = [2**i for i in range(13)]
PALEY = [36 * 2**i for i in range(8)]
orders = st.sampled_from(POWERS[:9] + PALEY[:5])
seeds = st.integers(0, 999)


def signs_of(k: int, seed: int = 0) -> Tensor:
    return (torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(torch.int8)


@pytest.mark.parametrize("order", POWERS[:-2] + PALEY[:-1])
def test_identities(order: int) -> None:
    h = hadamard_matrix(order)
    assert h.dtype == torch.float64 and h.shape == (order, order)
    assert (h.abs() == 1).all() and torch.equal(h, h.T)
    # Sums of at most 2^12 integers: exact.
    assert torch.equal(h @ h, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [4**i for i in range(7)])
def test_orders_4_to_the_k_are_regular(order: int) -> None:
    ones = torch.ones(order, dtype=torch.float64)
    assert torch.equal(hadamard_matrix(order).sum(0), ones * math.isqrt(order))
    assert torch.equal(rotate(ones, ones, order), ones)


@settings(max_examples=40, deadline=None)
@given(order=orders, blocks=st.integers(1, 3), lead=st.lists(st.integers(0, 3), max_size=2), seed=seeds)
def test_rotate_is_signs_then_blocks_of_h(order: int, blocks: int, lead: list[int], seed: int) -> None:
    k = order * blocks
    u = torch.randn(*lead, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    signs, before = signs_of(k, seed), u.clone()
    r = signs[:, None] * torch.block_diag(*[hadamard_matrix(order)] * blocks) / math.sqrt(order)
    # n roundings of 2^-53 each, n below 1200, of sums that stay below 30.
    torch.testing.assert_close(rotate(u, signs, order), u @ r, rtol=0, atol=1e-12)
    torch.testing.assert_close(r @ r.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(u, before)


@pytest.mark.parametrize("order", [1152, 4608, 4096])
def test_the_largest_rotations_are_orthogonal(order: int) -> None:
    u = torch.randn(8, order, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotated = rotate(u, signs_of(order), order)
    torch.testing.assert_close(rotated @ rotated.T, u @ u.T, rtol=1e-12, atol=1e-12 * order)
    # H = H^T and H H = n I: the way back is the same H, then the signs.
    back = rotate(rotated, torch.ones(order), order) * signs_of(order)
    torch.testing.assert_close(back, u, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [64, 256, 72, 1152])
def test_a_rotated_weight_undoes_the_rotation_and_an_outlier_is_spread(order: int) -> None:
    k = 2 * order
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(m, k, dtype=torch.float64, generator=g) for m in (3, 5))
    signs = signs_of(k)
    y = rotate(x, signs, order) @ rotate(weight, signs, order).T
    torch.testing.assert_close(y, x @ weight.T, rtol=0, atol=1e-12 * k)
    outlier = torch.zeros(k, dtype=torch.float64)
    outlier[3] = 1
    spread = rotate(outlier, signs, order)
    everywhere = torch.full((order,), order**-0.5, dtype=torch.float64)
    torch.testing.assert_close(spread[:order].abs(), everywhere, rtol=1e-12, atol=0)
    assert (spread[order:] == 0).all()


def test_rotate_works_in_and_after_inference_mode() -> None:
    with torch.inference_mode():
        rotate(torch.ones(2, 18 * 8), torch.ones(18 * 8), 144)
    weight = torch.ones(2, 144, requires_grad=True)
    rotate(weight, torch.ones(144), 144).sum().backward()
    assert weight.grad is not None


def test_default_orders() -> None:
    widths = (72, 288, 1152, 1536, 1920, 2240, 2304, 3072, 4608, 5120, 13824, 1000, 7)
    blocks = (4, 16, 64, 256, 64, 64, 256, 256, 256, 256, 256, 4, 1)
    assert [rotation_order(k) for k in widths] == list(blocks)
    assert [rotation_order(k, full_width=True) for k in (72, 1152, 4608, 2048)] == [72, 1152, 4608, 2048]


def test_unknown_orders_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="a power of two up to 4096, or 36 times one up to 128, got 12"):
        hadamard_matrix(12)
    for order in (0, -4, 8192, 36 * 256, 108):
        with pytest.raises(ValueError, match=f"got {order}"):
            split_order(order)
    with pytest.raises(
        ValueError, match=r"expected a divisor of 1152 in_features, got 256; rotation_order\(1152\) is 64"
    ):
        check_order(256, 1152)
    with pytest.raises(ValueError, match="rotation_order: expected a power of two .* got 3072"):
        rotation_order(3072, full_width=True)


def rotated_by_the_kernel(u: Tensor, signs: Tensor, order: int) -> Tensor:
    plan = quantize.dynamic_plan(torch.tensor([0], device=u.device), None, None, 8, signs, order)
    tile = _quantize_rows.row_tile(plan, u.dtype, u.shape[-1])
    assert tile is not None
    rotated = torch.empty_like(u)
    _quantize_rows._launch(u, plan, tile, "none", Rounded(rotated), None)
    return rotated


def assert_rotated(u: Tensor, signs: Tensor, order: int, rotated: Tensor) -> None:
    transform = InputTransform(torch.tensor([0]), None, None, signs, order)
    exact = exact_transform(Bounded(u.double(), torch.zeros(u.shape, dtype=torch.float64)), transform)
    assert ((rotated.double() - exact.value).abs() <= exact.error).all()
    # Errors have either sign: as a whole they are far below the bound, a few roundings of a typical number.
    assert (rotated.double() - exact.value).square().mean().sqrt() <= 8 * 2**-24 * exact.value.square().mean().sqrt()


@pytest.mark.parametrize("order", POWERS + PALEY)
def test_kernel_and_cpu_form_rotate_in_fp32(order: int) -> None:
    k = order * (2 if order <= 1152 else 1)
    u, signs = torch.randn(2, k, generator=torch.Generator().manual_seed(order)), signs_of(k)
    assert_rotated(u, signs, order, rotate(u, signs, order))
    if not torch.cuda.is_available():
        assert_rotated(u, signs, order, rotated_by_the_kernel(u, signs, order))


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("order", POWERS + PALEY)
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_kernel_rotates_in_fp32_on_the_gpu(order: int, blocks: int) -> None:
    k = order * blocks
    if k <= 4608:
        u, signs = torch.randn(300, k), signs_of(k)
        assert_rotated(u, signs, order, rotated_by_the_kernel(u.cuda(), signs.cuda(), order).cpu())
