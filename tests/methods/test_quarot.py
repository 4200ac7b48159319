# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_dq.methods import METHODS, Site


def site(channels: int, transformable: bool = True) -> Site:
    return Site("a", (torch.empty(4, channels, device="meta"),), None, transformable, has_producer=False)


def solve(site: Site, **options):
    method = METHODS["quarot"]
    return method(method.Options(**options)).solve([site], None)


@pytest.mark.parametrize(
    ("channels", "full_width", "order"), [(1152, False, 64), (1152, True, 1152), (40, True, 4), (12288, True, 256)]
)
def test_rotates_the_full_width_where_an_order_fits_and_blocks_elsewhere(channels, full_width, order):
    assert solve(site(channels), full_width=full_width).chains["a"].rotation.order == order


def test_what_cannot_be_rotated_is_said():
    solution = solve(site(30))
    assert not solution.chains and solution.notes == {"a": "not rotated: in_features is no multiple of 4"}


@pytest.mark.parametrize("full_width", [True, False])
def test_an_input_that_is_never_rounded_is_not_rotated(full_width):
    solution = solve(site(1152, transformable=False), full_width=full_width)
    assert not solution.chains and not solution.notes
