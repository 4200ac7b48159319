# SPDX-License-Identifier: Apache-2.0
import pytest

from diffusers_dq.config import DQConfig
from diffusers_dq.methods import METHODS
from diffusers_dq.scheme import QuantScheme, fitting_group


def method(**options):
    return METHODS["qdit"](METHODS["qdit"].Options(**options))


@pytest.mark.parametrize(
    ("width", "wanted", "size"),
    [(1152, 128, 128), (1152, 256, 192), (4608, 256, 256), (96, 64, 32), (1152, 1152, 1152), (72, 64, None)],
)
def test_the_group_size_is_the_largest_that_fits(width, wanted, size):
    assert fitting_group(width, wanted) == size


def test_weight_and_input_have_the_same_groups_and_zero_points_where_the_kernels_carry_them():
    assert method().weight_scheme(4, 1152, 128) == QuantScheme(
        bits=4, granularity="group", symmetric=False, group_size=128
    )
    assert method().weight_scheme(8, 1152, 128).symmetric
    assert method().activation_scheme(8, 1152, 128) == QuantScheme(
        bits=8, granularity="group", symmetric=False, dynamic=True, group_size=128
    )
    assert method(activations="token").activation_scheme(8, 1152, 128).granularity == "token"


def test_a_width_that_no_group_divides_has_one_scale_a_row():
    assert method().weight_scheme(4, 72, 128).granularity == "channel"
    assert method().activation_scheme(8, 72, 128).granularity == "token"


def test_group_sizes_by_layer():
    config = DQConfig("qdit", overrides={"*.ff.net.2": {"group_size": 32}, "*.to_q": {"group_size": 0}})
    sizes = [config.recipe_of(name).group_size for name in ("a.ff.net.2", "a.to_q", "a.to_k")]
    assert sizes == [32, 0, 128]
    assert DQConfig("qdit", group_size=64).recipe_of("a.to_k").group_size == 64


@pytest.mark.parametrize("changes", [dict(group_size=48), dict(overrides={"*": {"group_size": -32}})])
def test_group_sizes_that_no_kernel_can_follow_are_refused(changes):
    with pytest.raises(ValueError, match="group_size must be a multiple of 32"):
        DQConfig("qdit", **changes)
