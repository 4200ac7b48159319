# SPDX-License-Identifier: Apache-2.0
"""Shapes, contestants and the figures of a row; the products themselves are tested with the kernels."""

import pytest
import torch

from diffusers_dq.benchmark.gemm import CPU_LARGE, LARGE, SMALL, SMALL_M, Gemm, gemm_part, peak_part
from diffusers_dq.benchmark.settings import Settings

SETTINGS = Settings(device="cpu", rounds=2, backend="eager")


@torch.no_grad()
def test_a_row_has_speed_and_its_part_of_the_peak():
    rows = {row["name"]: row for row in gemm_part(Gemm("test", 64, 32, 48)).measure(SETTINGS, 0.5)["rows"]}
    for name in ("W8A8 static", "W4A8 dynamic", "bf16 compiled", "fp32", "torch._int_mm"):
        row = rows[name]
        assert row["tops"] == pytest.approx(2 * 64 * 32 * 48 / row["median_ms"] * 1e3 / 1e12)
        assert row["of_int8_peak"] == pytest.approx(row["tops"] / 0.5)
        assert row["times_int_mm"] == pytest.approx(rows["torch._int_mm"]["median_ms"] / row["median_ms"])


@torch.no_grad()
def test_few_rows_are_for_the_weight_only_products():
    rows = gemm_part(Gemm("test", 2, 32, 48)).measure(SETTINGS, None)["rows"]
    assert [row["name"] for row in rows] == ["bf16", "bf16 compiled", "fp32", "W8A16", "W4A16"]


@torch.no_grad()
def test_the_peak_is_the_best_integer_product_and_says_so():
    group = peak_part(64).measure(SETTINGS, None)
    speeds = {row["name"]: row["tops"] for row in group["rows"]}
    assert group["int8_tops"] == max(speeds["torch._int_mm"], speeds["W8A8 static"])
    assert "M = N = K = 64" in group["definition"]


@torch.no_grad()
def test_a_product_that_fails_is_a_row_with_its_reason():
    rows = {row["name"]: row for row in gemm_part(Gemm("odd K", 64, 32, 47)).measure(SETTINGS, None)["rows"]}
    assert "failed" in rows["W4A8 static"], "int4 weights come in pairs"
    assert "median_ms" in rows["bf16"]


def test_the_shapes_are_named_once_and_reach_as_far_as_the_bars():
    names = [gemm.name for gemm in (*LARGE, *SMALL)]
    assert len(set(names)) == len(names)
    assert all(gemm.m >= 4096 for gemm in LARGE)
    assert all(gemm.m < SMALL_M for gemm in SMALL)
    assert max(gemm.m for gemm in CPU_LARGE) >= 4096
