# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 training script, on a few made-up pictures and with a tiny width."""

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 4
TINY = ["--vae-steps", "3", "--steps", str(STEPS), "--vae-channels", "8", "8", "--width", "16", "--heads", "2"]
TINY += ["--depth", "2", "--batch-size", "4", "--checkpoint-every", "1", "--log-every", "2", "--device", "cpu"]
TINY += ["--sample-steps", "2"]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_dit_cifar10", EXAMPLES / "train_dit_cifar10.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def write_npz(path: Path, count: int) -> None:
    """Gradients, tilted and coloured by their number."""
    files, ramp = [], np.arange(32)
    for i in range(count):
        pixels = np.stack([8 * ramp[:, None] + 0 * ramp, 8 * ramp + 0 * ramp[:, None], np.full((32, 32), 20 * i)], -1)
        Image.fromarray((pixels % 256).astype(np.uint8)).save(buffer := io.BytesIO(), "JPEG")
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    labels = np.arange(count, dtype=np.uint8) % 10
    np.savez(path, data=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_npz(folder / "train_jpeg.npz", 12)
    write_npz(folder / "test_jpeg.npz", 2)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    script.main(["--data", str(data), "--output", str(output), *TINY])
    return output


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    public = {name: value for name, value in config.items() if not name.startswith("_") and name != "scaling_factor"}
    return dict(json.loads(json.dumps(public)))


def weights(output: Path) -> dict[str, torch.Tensor]:
    parts = ("vae", "transformer")
    files = {part: load_file(output / part / "diffusion_pytorch_model.safetensors") for part in parts}
    return {f"{part}.{name}": value for part, file in files.items() for name, value in file.items()}


def shipped_config(part: str) -> dict[str, Any]:
    return dict(json.loads((EXAMPLES / "dit-cifar10" / part).read_text()))


def test_defaults_are_the_shipped_settings() -> None:
    args = script.parse_args(["--data", "data", "--output", "output"])
    assert (args.vae_steps, args.vae_lr, args.steps, args.lr) == (2000, 2e-3, 12823, 1e-3)
    assert (args.batch_size, args.ema, args.seed, args.bf16) == (64, 0.9995, 1, True)
    assert settings_of(script.build_vae(args).config) == settings_of(shipped_config("vae/config.json"))
    transformer = script.build_transformer(args)
    assert settings_of(transformer.config) == settings_of(shipped_config("transformer/config.json"))
    shipped = load_file(EXAMPLES / "dit-cifar10/transformer/diffusion_pytorch_model.safetensors")
    assert {k: v.shape for k, v in transformer.state_dict().items()} == {k: v.shape for k, v in shipped.items()}


def test_trained_folder_is_a_pipeline(trained: Path) -> None:
    pipeline = DiTPipeline.from_pretrained(trained)
    assert pipeline.labels == {name: i for i, name in enumerate(script.CLASSES)}
    scheduler = shipped_config("scheduler/scheduler_config.json")
    assert settings_of(pipeline.scheduler.config) == settings_of(scheduler)
    index = shipped_config("model_index.json")
    assert json.loads((trained / "model_index.json").read_text()) == index
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([3], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert images.shape == (1, 32, 32, 3) and np.isfinite(images).all()
    with Image.open(trained / "samples.png") as grid:
        assert grid.size == (8 * 64, 10 * 64)
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in log] == [
        ("vae", 2), ("vae", 3), ("transformer", 2), ("transformer", 4),
    ]  # fmt: skip


def test_scaling_factor_gives_unit_latents(trained: Path, data: Path) -> None:
    vae = DiTPipeline.from_pretrained(trained).vae
    pixels, _ = script.load_images(data / "train_jpeg.npz")
    latents = torch.cat([script.encode(vae, images, "cpu") for images in (pixels, pixels.flip(-1))])
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, rel=1e-5)


def test_embedders_are_trained_together(trained: Path) -> None:
    transformer = DiTPipeline.from_pretrained(trained).transformer
    first, second = (block.norm1.emb.state_dict() for block in transformer.transformer_blocks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("stage", ["vae", "transformer"])
def test_resumed_run_equals_the_uninterrupted_one(
    stage: str, trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--data", str(data), "--output", str(tmp_path), *TINY]
    save = script.Training.save

    def save_then_stop(state: Any) -> None:
        save(state)
        if (state.stage, state.step) == (stage, 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script.Training, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            script.main(command)
    assert not (tmp_path / "model_index.json").exists()
    with pytest.raises(SystemExit, match="pass --resume"):
        script.main(command)
    with pytest.raises(SystemExit, match=r"other settings .*'lr': \(0.001, 0.5\)"):
        script.main([*command, "--resume", "--lr", "0.5"])

    script.main([*command, "--resume"])
    resumed, expected = weights(tmp_path), weights(trained)
    assert resumed.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []


def test_missing_data_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"train_jpeg.npz not found: expected an npz with data, offsets and labels"):
        script.main(["--data", str(tmp_path), "--output", str(tmp_path / "out"), *TINY])
    np.savez(tmp_path / "train_jpeg.npz", images=np.zeros(3))
    with pytest.raises(SystemExit, match=r"lacks \['data', 'labels', 'offsets'\]; it has \['images'\]"):
        script.main(["--data", str(tmp_path), "--output", str(tmp_path / "out"), *TINY])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--width", "30"], "--width must be a multiple of --heads, got 30 and 4"),
        (["--vae-channels", "12", "24"], "--vae-channels must be multiples of 8, got [12, 24]"),
    ],
)
def test_impossible_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.parse_args(["--data", "data", "--output", "output", *arguments])
    assert message in capsys.readouterr().err


def test_schedules() -> None:
    assert [round(script.late_decay(t), 3) for t in (0, 0.6, 0.8, 1)] == [1, 1, 0.5, 0]
    assert [round(script.one_cycle(t), 3) for t in (0, 0.3, 0.65, 1)] == [0.04, 1, 0.5, 0]
