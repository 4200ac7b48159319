# SPDX-License-Identifier: Apache-2.0
import pytest

from diffusers_dq.methods import METHODS
from diffusers_dq.methods.qdit import fitting_group
from diffusers_dq.scheme import QuantScheme


def method(**options):
    return METHODS["qdit"](METHODS["qdit"].Options(**options))


@pytest.mark.parametrize(
    ("width", "wanted", "size"),
    [(1152, 128, 128), (1152, 256, 192), (4608, 256, 256), (96, 64, 32), (1152, 1152, 1152), (72, 64, None)],
)
def test_the_group_size_is_the_largest_that_fits(width, wanted, size):
    assert fitting_group(width, wanted) == size


def test_weight_and_input_have_the_same_groups_and_zero_points_where_the_kernels_carry_them():
    assert method().weight_scheme(4, 1152) == QuantScheme(bits=4, granularity="group", symmetric=False, group_size=128)
    assert method().weight_scheme(8, 1152).symmetric
    assert method().activation_scheme(8, 1152) == QuantScheme(
        bits=8, granularity="group", symmetric=False, dynamic=True, group_size=128
    )
    assert method(activations="token").activation_scheme(8, 1152).granularity == "token"


def test_a_width_that_no_group_divides_has_one_scale_a_row():
    assert method().weight_scheme(4, 72).granularity == "channel"
    assert method().activation_scheme(8, 72).granularity == "token"


@pytest.mark.parametrize("options", [dict(group_size=48), dict(group_size=0), dict(search="output")])
def test_options_that_no_kernel_can_follow_are_refused(options):
    with pytest.raises(ValueError, match="group_size must be|search='output'"):
        method(**options)
