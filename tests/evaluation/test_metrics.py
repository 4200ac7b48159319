# SPDX-License-Identifier: Apache-2.0
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_dq.evaluation import metrics, psnr, ssim
from diffusers_dq.evaluation.metrics import ratio_db, snr_db

pictures = np.random.default_rng(0).random((3, 16, 20, 3))


@settings(max_examples=25, deadline=None)
@given(error=st.floats(1e-6, 0.5))
def test_psnr_of_a_constant_error_is_its_square_in_decibels(error: float) -> None:
    low = pictures / 2
    np.testing.assert_allclose(psnr(low, low + error), -20 * math.log10(error), rtol=1e-9)


def test_psnr_of_equal_pictures_is_infinite_a_picture() -> None:
    other = pictures.copy()
    other[1] = 1 - other[1]
    assert np.isinf(psnr(pictures, other)).tolist() == [True, False, True]


def test_arrays_and_tensors_of_any_precision_are_one() -> None:
    a, b = torch.tensor(pictures).bfloat16(), torch.tensor(pictures).flip(0).bfloat16()
    np.testing.assert_array_equal(psnr(a, b), psnr(a.float().numpy(), b.float().numpy()))


def test_ssim_is_one_for_equal_and_falls_with_noise() -> None:
    noise = np.random.default_rng(1).normal(size=pictures.shape)
    values = [ssim(pictures, (pictures + level * noise).clip(0, 1)) for level in (0, 0.05, 0.2)]
    np.testing.assert_allclose(values[0], 1, atol=1e-12)
    assert (values[0] > values[1]).all() and (values[1] > values[2]).all()
    assert ssim(pictures[:1], pictures[:1]).shape == (1,)


def test_ssim_of_two_flat_pictures_is_the_luminance_term() -> None:
    """Without variance (2 a b + C1) / (a^2 + b^2 + C1), C1 = 0.01^2 (Wang et al., Eq. 6 and 13)."""
    a, b, c1 = 0.4, 0.6, 1e-4
    flat = np.ones((1, 16, 16, 3))
    np.testing.assert_allclose(ssim(a * flat, b * flat), (2 * a * b + c1) / (a * a + b * b + c1), rtol=1e-6)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_wrong_shapes_and_ranges_are_refused(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match=r"\(3, 16, 20, 3\) and \(2, 16, 20, 3\)"):
        metric(pictures, pictures[:2])
    with pytest.raises(ValueError, match=r"B, H, W, C"):
        metric(pictures[0], pictures[0])
    with pytest.raises(ValueError, match=r"in \[0, 1\], got torch.uint8"):
        metric(pictures, (pictures * 255).astype(np.uint8))
    with pytest.raises(ValueError, match=r"in \[0, 1\], got torch.float64 in \[-1, "):
        metric(pictures, np.where(pictures == pictures.min(), -1, pictures))


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="11 x 11 at least, got 8 x 20"):
        ssim(pictures[:, :8], pictures[:, :8])


def test_snr() -> None:
    x = torch.randn(4, 5)
    assert snr_db(x, 1.1 * x) == pytest.approx(20, abs=1e-5)  # x is fp32
    assert snr_db(x, x) == math.inf
    assert ratio_db(0.0, 1.0) == -math.inf and ratio_db(0.0, 0.0) == math.inf
    assert math.isnan(snr_db(x, x * math.nan))
    with pytest.raises(ValueError, match="differ in shape"):
        snr_db(x, x[:3])


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r"needs no_such_package.*pip install diffusers-dq\[eval\]"):
        metrics.optional("no_such_package.part")


def test_importing_the_package_imports_neither_matplotlib_nor_torchmetrics() -> None:
    code = "import sys, diffusers_dq.evaluation; print({'matplotlib', 'torchmetrics'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
