# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dq import affine
from diffusers_dq.scheme import QuantScheme

SCHEMES = [
    QuantScheme(bits=bits, granularity="tensor", symmetric=symmetric) for bits in (4, 8) for symmetric in (True, False)
]


@given(
    seed=st.integers(0, 2**31), scheme=st.sampled_from(SCHEMES), offset=st.floats(-5, 5), spread=st.floats(1e-3, 1e3)
)
def test_rounding_moves_a_value_inside_the_range_by_half_a_step_at_most(seed, scheme, offset, spread):
    x = (torch.randn(200, generator=torch.Generator().manual_seed(seed)) + offset) * spread
    scale, zero_point = affine.affine_parameters(x.amin(), x.amax(), scheme)
    q = affine.quantize(x, scale, zero_point, scheme)
    error = (affine.dequantize(q, scale, zero_point) - x).abs()
    # The zero point is rounded too, so an end of an asymmetric range may be cut by up to half a step more;
    # fp32 arithmetic on values of up to 127 steps adds 127 * 2^-23 of a step.
    steps = 0.5 if scheme.symmetric else 1.0
    assert (error <= scale * (steps + 1e-4)).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounded_values_are_those_of_the_integers(scheme):
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) + 1
    scale, zero_point = (p[:, None] for p in affine.affine_parameters(x.amin(1) * 0.7, x.amax(1) * 0.7, scheme))
    q = affine.quantize(x, scale, zero_point, scheme)
    assert torch.equal(affine.rounded(x, scale, zero_point, scheme), affine.dequantize(q, scale, zero_point))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("low, high", [(0.0, 0.0), (1.0, 3.0), (-3.0, -1.0), (-1e-30, 1e30)])
def test_zero_is_exact_and_the_scale_positive(scheme, low, high):
    scale, zero_point = affine.affine_parameters(torch.tensor(low), torch.tensor(high), scheme)
    assert scale > 0
    assert scheme.qmin <= zero_point <= scheme.qmax
    zero = torch.zeros(1)
    assert affine.dequantize(affine.quantize(zero, scale, zero_point, scheme), scale, zero_point) == 0


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_searched_range_is_never_worse_than_the_full_one(scheme):
    x = torch.randn(6, 4000, generator=torch.Generator().manual_seed(0)) ** 3
    low, high = x.amin(1), x.amax(1)

    def error(scale, zero_point):
        scale, zero_point = scale[:, None], zero_point[:, None]
        rounded = affine.dequantize(affine.quantize(x, scale, zero_point, scheme), scale, zero_point)
        return (x - rounded).abs().pow(affine.ERROR_POWER).sum(1)

    searched = error(*affine.search_range(x, low, high, scheme))
    full = error(*affine.affine_parameters(low, high, scheme))
    assert (searched <= full).all()
    if scheme.bits == 4:
        assert (searched < full).all(), "heavy tails at 4 bits: clipping must have paid"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(bits=1, granularity="tensor"), "between 2 and 8"),
        (dict(bits=16, granularity="tensor"), "16 \\(not rounded\\)"),
        (dict(bits=8, granularity="token"), "needs dynamic=True"),
        (dict(bits=8, granularity="token", dynamic=True, symmetric=False), "symmetric"),
        (dict(bits=8, granularity="channel", symmetric=False), "symmetric"),
        (dict(bits=8, granularity="group"), "group_size goes with"),
        (dict(bits=8, granularity="token", dynamic=True, group_size=32), "group_size goes with"),
        (dict(bits=8, granularity="group", group_size=48), "multiple of 32"),
    ],
)
def test_a_scheme_without_meaning_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantScheme(**arguments)


GROUPED = [QuantScheme(bits=bits, granularity="group", symmetric=bits == 8, group_size=32) for bits in (4, 8)]


@pytest.mark.parametrize("scheme", GROUPED, ids=str)
@pytest.mark.parametrize("search", ["minmax", "mse", "output"])
def test_a_group_of_a_weight_is_rounded_on_its_own(scheme, search):
    """As if each were a row; and to half a step of its own scale where nothing is clipped."""
    torch.manual_seed(0)
    weight = torch.randn(6, 96) * torch.tensor([0.01, 1.0, 5.0]).repeat_interleave(32) + 0.1
    importance = torch.rand(96) + 0.5
    rounded = affine.quantize_weight(weight, scheme, search, importance)
    assert rounded.integers.shape == (6, 96) and rounded.scale.shape == (6, 3)
    assert (rounded.zero_point is None) == scheme.symmetric
    for i in range(3):
        columns = slice(32 * i, 32 * (i + 1))
        alone = affine.quantize_weight(weight[:, columns], scheme, search, importance[columns])
        assert torch.equal(alone.integers, rounded.integers[:, columns])
        assert torch.equal(alone.scale[:, 0], rounded.scale[:, i])
    if search == "minmax":
        error = (rounded.dequantized() - weight).abs().unflatten(1, (3, 32))
        # half a step, and half of one more at the ends of a range whose zero point has been rounded
        assert (error <= rounded.scale[..., None] * (0.5 if scheme.symmetric else 1.0) * 1.0001).all()


def test_one_group_of_all_channels_is_a_scale_a_row():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    grouped = affine.quantize_weight(weight, QuantScheme(bits=8, granularity="group", group_size=64))
    whole = affine.quantize_weight(weight, QuantScheme(bits=8, granularity="channel"))
    assert torch.equal(grouped.integers, whole.integers) and torch.equal(grouped.scale[:, 0], whole.scale)


def test_finer_groups_err_less():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) ** 3

    def error(**scheme):
        rounded = affine.quantize_weight(weight, QuantScheme(bits=4, **scheme))
        return float((rounded.dequantized() - weight).norm())

    by_size = [error(granularity="group", group_size=size) for size in (32, 64, 128, 256)]
    assert by_size == sorted(by_size) and by_size[-1] == pytest.approx(error(granularity="channel"))


def test_a_group_size_that_does_not_divide_the_width_is_an_error():
    with pytest.raises(ValueError, match="group_size must divide the 48 in_features, got 32"):
        affine.quantize_weight(torch.randn(2, 48), QuantScheme(bits=8, granularity="group", group_size=32))
