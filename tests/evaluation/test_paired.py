# SPDX-License-Identifier: Apache-2.0
import json
import math
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline
from PIL import Image
from support import tiny_pipeline
from torch import Tensor, nn

import diffusers_dq as dq
from diffusers_dq.evaluation import Comparison, compare, image_grid, psnr
from diffusers_dq.evaluation.metrics import snr_db
from diffusers_dq.evaluation.paired import _pictures, _rows, _run
from diffusers_dq.linear import QuantizedLinear

CALLS = [dict(class_labels=[1, 2], guidance_scale=1.5), dict(class_labels=[3], guidance_scale=1.5)]
STEPS = 3


def pipeline() -> DiTPipeline:
    return tiny_pipeline(sample_size=16, out_channels=4)  # 16 x 16 pictures: SSIM needs 11


@pytest.fixture(scope="module")
def reference() -> DiTPipeline:
    return pipeline()


@pytest.fixture(scope="module")
def quantized() -> DiTPipeline:
    pipe = pipeline()
    dq.quantize(pipe, dq.DQConfig("rtn"), progress=False)
    return pipe


@pytest.fixture(scope="module")
def comparison(reference: DiTPipeline, quantized: DiTPipeline) -> Comparison:
    return compare(reference, quantized, CALLS, num_inference_steps=STEPS, seed=5, progress=False)


def hooks(pipe: DiTPipeline) -> list[tuple[str, int, int]]:
    modules = pipe.transformer.named_modules()
    return [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules]


def twin_of(pipe: DiTPipeline) -> DiTPipeline:
    return DiTPipeline(deepcopy(pipe.transformer), pipe.vae, deepcopy(pipe.scheduler))


def test_a_model_is_equal_to_its_copy(reference: DiTPipeline) -> None:
    same = compare(reference, twin_of(reference), CALLS, num_inference_steps=STEPS, progress=False)
    assert same.mean_psnr == math.inf and (same.psnr == np.inf).all()
    np.testing.assert_allclose(same.ssim, 1, atol=1e-12)
    assert (same.latent_snr == np.inf).all() and same.layer_snr == {} and same.left_out == {}


def test_a_quantized_model_is_equal_to_its_copy_layer_by_layer(quantized: DiTPipeline) -> None:
    same = compare(quantized, twin_of(quantized), CALLS[:1], num_inference_steps=2, progress=False)
    # Not inf: blocks that are observed layer by layer are not fused, and sum in another order.
    assert same.mean_psnr >= 90
    assert all((snr >= 60).all() for snr in same.layer_snr.values()) and len(same.layer_snr) == 10


def test_pictures_are_those_of_the_pipelines_run_by_hand(
    comparison: Comparison, reference: DiTPipeline, quantized: DiTPipeline
) -> None:
    for pipe, images in ((reference, comparison.images_reference), (quantized, comparison.images_quantized)):
        by_hand = [
            pipe(**call, generator=torch.Generator().manual_seed(5 + i), num_inference_steps=STEPS, output_type="np")
            for i, call in enumerate(CALLS)
        ]
        np.testing.assert_array_equal(images, np.concatenate([output.images for output in by_hand]))
    np.testing.assert_array_equal(comparison.psnr, psnr(comparison.images_reference, comparison.images_quantized))
    assert comparison.psnr.shape == comparison.ssim.shape == (3,)
    assert np.isfinite(comparison.psnr).all() and (comparison.ssim < 1).all()


def test_steps_are_the_schedulers_and_latents_start_equal(comparison: Comparison, reference: DiTPipeline) -> None:
    reference.scheduler.set_timesteps(STEPS)
    assert comparison.timesteps.tolist() == reference.scheduler.timesteps.tolist()
    assert comparison.latent_snr[0] == np.inf and np.isfinite(comparison.latent_snr[1:]).all()


def test_layer_snr_is_that_of_direct_computation(
    comparison: Comparison, reference: DiTPipeline, quantized: DiTPipeline
) -> None:
    """Inputs of the reference trajectory kept, both models run on them, outputs kept, compared at once."""
    inputs: list[tuple[Any, Any]] = []
    handle = reference.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    for i, call in enumerate(CALLS):
        _run(reference, call, STEPS, seed=5 + i)
    handle.remove()

    outputs: tuple[dict[str, list[Tensor]], ...] = (defaultdict(list), defaultdict(list))
    for model, kept in zip((reference.transformer, quantized.transformer), outputs, strict=True):
        handles = [
            model.get_submodule(name).register_forward_hook(lambda m, a, y, to=kept[name]: to.append(y.flatten()))
            for name in comparison.layer_snr
        ]
        for args, kwargs in inputs:
            with torch.no_grad():
                model(*args, **kwargs)
        for handle in handles:
            handle.remove()
    for name, snr in comparison.layer_snr.items():
        for step in range(STEPS):
            x, y = (torch.cat(kept[name][step::STEPS]) for kept in outputs)
            assert snr[step] == pytest.approx(snr_db(x, y), abs=1e-4)  # sums in fp32 against fp64: 1e-5 relative


def test_each_quantized_linear_is_compared_or_named_with_a_reason(
    comparison: Comparison, quantized: DiTPipeline
) -> None:
    layers = {name for name, m in quantized.transformer.named_modules() if isinstance(m, QuantizedLinear)}
    assert layers == comparison.layer_snr.keys() | comparison.left_out.keys()
    assert not comparison.layer_snr.keys() & comparison.left_out.keys()
    assert set(comparison.left_out) == {
        f"transformer_blocks.{i}.{name}" for i in range(2) for name in ("norm1.linear", "attn1.to_v")
    }


def test_folds_are_no_error(reference: DiTPipeline) -> None:
    """HTG without rounding shifts and scales what the carriers emit; everything compared stays at fp32 rounding."""
    pipe = pipeline()
    statistics = dq.calibrate(reference, CALLS, num_inference_steps=STEPS, progress=False)
    config = dq.DQConfig("htg", weight_bits=16, activation_bits=16)
    dq.quantize(pipe, config, statistics=statistics, progress=False)
    result = compare(reference, pipe, CALLS[:1], num_inference_steps=2, progress=False)
    assert min(snr.min() for snr in result.layer_snr.values()) > 90
    assert result.mean_psnr > 90


def test_worst_layers_come_lowest_first(comparison: Comparison) -> None:
    worst = comparison.worst_layers(4)
    assert [value for _, value in worst] == sorted(float(snr.mean()) for snr in comparison.layer_snr.values())[:4]
    assert all(comparison.layer_snr[name].mean() == value for name, value in worst)
    assert len(comparison.worst_layers(1000)) == len(comparison.layer_snr)


def test_saved_files(comparison: Comparison, tmp_path: Path) -> None:
    comparison.save(tmp_path / "new" / "folder")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "new/folder/comparison.json").read_text()
    saved = json.loads(text, parse_constant=refuse)
    assert saved == comparison.to_dict()
    assert saved["latent_snr"][0] == "inf" and float(saved["latent_snr"][0]) == math.inf
    assert saved["mean_psnr"] == comparison.mean_psnr
    for name in ("grid.png", "layer_snr.png"):
        with Image.open(tmp_path / "new/folder" / name) as image:
            image.verify()


def by_hand(reference: Any, quantized: Any) -> Comparison:
    n = len(reference)
    return Comparison(
        images_reference=reference,
        images_quantized=quantized,
        psnr=np.arange(20.0, 20 + n),
        ssim=np.linspace(0.5, 0.9, n),
        timesteps=np.array([1.0]),
        latent_snr=np.array([np.inf]),
        layer_snr={},
        left_out={},
    )


@pytest.mark.parametrize(("largest", "gain"), [(0.8, 1), (0.24, 4), (0.1, 8), (0.001, 64), (0.0, 64)])
def test_the_grid_shows_full_precision_quantized_and_the_amplified_difference(largest: float, gain: int) -> None:
    """gain: the largest power of two, 64 at most, that keeps the difference below 1."""
    rng = np.random.default_rng(0)
    reference = rng.random((9, 16, 16, 3)) * (1 - largest)
    up = rng.random((9, 16, 16, 3)) < 0.5  # where quantized is above: the difference has both signs
    difference = largest * rng.choice([0.5, 1.0], (9, 16, 16, 3))
    reference, quantized = (
        np.where(up, reference, reference + difference),
        np.where(up, reference + difference, reference),
    )
    comparison = by_hand(reference, quantized)
    grid = np.asarray(comparison.grid())
    rows = [
        [grid[top : top + 128 : 8, left : left + 128 : 8, :3] for left in lefts]
        for top, lefts in tile_corners(grid, rows=3, columns=8)
    ]
    for shown, expected in zip(rows, (reference, quantized, gain * difference), strict=True):
        np.testing.assert_array_equal(shown, (expected[:8] * 255).round().astype(np.uint8))
    labels = {
        "full precision": reference[:8],
        "quantized": quantized[:8],
        f"difference x {gain}": gain * difference[:8],
    }
    captions = [f"{20 + i}.0 dB\nSSIM {0.5 + 0.05 * i:.3f}" for i in range(8)]
    np.testing.assert_array_equal(grid, np.asarray(image_grid(labels, captions=captions)))


def tile_corners(grid: Any, *, rows: int, columns: int) -> list[tuple[int, list[int]]]:
    """(top, lefts) of each row of tiles of 128 x 128: the only runs of solid pixels that long."""
    solid = grid[..., 3] == 255
    lefts = _starts(solid[14])  # within the first row
    tops = _starts(solid[:, lefts[0] + 1])
    assert (len(tops), len(lefts)) == (rows, columns)
    return [(top, lefts) for top in tops]


def _starts(line: Any) -> list[int]:
    changes = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(int), [0]]))).reshape(-1, 2)
    return [int(start) for start, end in changes if end - start == 128]


def test_without_layers_there_is_no_heatmap(reference: DiTPipeline, quantized: DiTPipeline, tmp_path: Path) -> None:
    result = compare(reference, quantized, CALLS[1:], num_inference_steps=2, layers=False, progress=False)
    result.save(tmp_path)
    assert result.layer_snr == {} and sorted(p.name for p in tmp_path.iterdir()) == ["comparison.json", "grid.png"]


@pytest.mark.parametrize("which", [0, 1])
def test_hooks_are_removed_after_an_exception(reference: DiTPipeline, quantized: DiTPipeline, which: int) -> None:
    pipes = reference, quantized
    before = [hooks(pipe) for pipe in pipes]

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise RuntimeError("broken")

    handle = pipes[which].transformer.transformer_blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        compare(*pipes, CALLS, num_inference_steps=2, progress=False)
    handle.remove()
    assert [hooks(pipe) for pipe in pipes] == before


def test_no_hooks_stay(comparison: Comparison, reference: DiTPipeline) -> None:
    assert hooks(reference) == hooks(pipeline())


def test_what_cannot_be_compared_is_refused(reference: DiTPipeline, quantized: DiTPipeline) -> None:
    def check(a: Any, b: Any, calls: Any, **settings: Any) -> None:
        compare(a, b, calls, **{"num_inference_steps": 2, "progress": False, **settings})

    with pytest.raises(ValueError, match="two pipelines, got DiTTransformer2DModel"):
        check(reference.transformer, quantized, CALLS)
    with pytest.raises(ValueError, match="different classes: DiTPipeline and DDPMPipeline"):
        check(reference, DDPMPipeline(None, reference.scheduler), CALLS)
    with pytest.raises(ValueError, match="very same transformer"):
        check(reference, reference, CALLS)
    with pytest.raises(ValueError, match="very same transformer"):
        check(reference, DiTPipeline(reference.transformer, reference.vae, reference.scheduler), CALLS)
    with pytest.raises(ValueError, match="non-empty list"):
        check(reference, quantized, [])
    with pytest.raises(TypeError, match=r"calls\[0\].*prompt"):
        check(reference, quantized, [dict(class_labels=[1], prompt="a cat")])
    with pytest.raises(ValueError, match=r"calls\[0\] sets generator"):
        check(reference, quantized, [dict(class_labels=[1], generator=torch.Generator())])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        check(reference, quantized, CALLS, num_inference_steps=0)


def test_layers_need_one_dtype(reference: DiTPipeline) -> None:
    half = pipeline().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch.float32 on cpu and the quantized one torch.bfloat16.*layers=False"):
        compare(reference, half, CALLS, num_inference_steps=2, progress=False)
    assert compare(reference, half, CALLS[1:], num_inference_steps=2, layers=False, progress=False).mean_psnr > 20


def test_other_timesteps_are_refused(reference: DiTPipeline, quantized: DiTPipeline) -> None:
    other = DiTPipeline(quantized.transformer, quantized.vae, DDIMScheduler(timestep_spacing="trailing"))
    before = hooks(other)
    with pytest.raises(ValueError, match="same scheduler"):
        compare(reference, other, CALLS, num_inference_steps=2, progress=False)
    assert hooks(other) == before


def test_a_calls_output_type_does_not_matter(reference: DiTPipeline, comparison: Comparison) -> None:
    image = _run(reference, {**CALLS[0], "output_type": "latent"}, STEPS, seed=5)
    np.testing.assert_array_equal(image, comparison.images_reference[:2])


def test_pictures_and_first_frames_of_every_kind_of_output() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8, 3), dtype=np.uint8)  # [B, F, H, W, C]
    array = frames / np.float32(255)
    pil = [[Image.fromarray(frame) for frame in clip] for clip in frames]
    for output in (array, array[:, 0], list(array[:, 0]), pil, [clip[0] for clip in pil]):
        np.testing.assert_array_equal(_pictures(output), array[:, 0])


def test_many_tokens_are_thinned_evenly() -> None:
    y = torch.arange(9000.0).reshape(3, 3000, 1).expand(3, 3000, 2)
    rows = _rows(y)
    assert rows.shape == (4096, 2) and rows[0, 0] == 0 and rows[-1, 0] == 8999
    assert rows[:, 0].diff().min() >= 2 and rows[:, 0].diff().max() <= 3  # 8999 / 4095 = 2.2
    assert torch.equal(_rows(y[:1]), y[0])


def test_a_scheduler_that_draws_its_own_noise_draws_the_same_for_both():
    """DiT's pipeline keeps the generator from the scheduler, which then draws on torch's global one."""
    pipes = []
    for _ in range(2):
        pipe = tiny_pipeline(sample_size=16)
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        pipes.append(pipe)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    result = compare(*pipes, CALLS[:1], num_inference_steps=4, layers=False, progress=False)
    assert np.isinf(result.psnr).all()
    assert torch.equal(torch.rand(1), expected), "and the global generator goes on as if nothing had happened"
