# SPDX-License-Identifier: Apache-2.0
"""examples/space_app.py without a browser; with gradio where it is installed."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import RepoCard
from support import tiny_pipeline, tiny_pixart_pipeline

from diffusers_dq.denoise import run_call

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_both_make_the_pictures_of_the_seed(app, pair):
    shown = app.side_by_side(pair, "cat", seed=3, steps=2, pictures=2)
    call = dict(class_labels=[1, 1], guidance_scale=1.5)
    for pipe, images in ((pair.reference, shown.reference), (pair.quantized, shown.quantized)):
        expected = run_call(pipe, call, num_inference_steps=2, seed=3, output_type="np")
        factor = len(images[0]) // expected.shape[1]
        assert len(images) == 2 and factor > 1
        for image, original in zip(images, expected, strict=True):
            assert np.array_equal(image[::factor, ::factor], (original.clip(0, 1) * 255).round().astype(np.uint8))
    assert not np.array_equal(shown.reference[0], shown.quantized[0])
    assert np.concatenate(shown.difference).any() and "PSNR" in shown.summary


def test_seed_and_steps_matter_and_a_repetition_does_not(app, pair):
    def first(**settings):
        return app.side_by_side(pair, "dog", pictures=1, **settings).reference[0]

    once = first(seed=0, steps=2)
    assert np.array_equal(once, first(seed=0, steps=2))
    assert not np.array_equal(once, first(seed=1, steps=2)) and not np.array_equal(once, first(seed=0, steps=3))


def test_the_first_name_of_a_class_is_shown(pair):
    assert pair.labels == ("dog", "cat")


def test_what_cannot_be_shown_is_refused(app, pair):
    with pytest.raises(ValueError, match="'cow' is no class of this model; it has dog, cat"):
        app.side_by_side(pair, "cow", seed=0, steps=2)
    for wrong in (
        dict(seed=-1, steps=2),
        dict(seed=2**63, steps=2),
        dict(seed=0, steps=0),
        dict(seed=0, steps=2, pictures=9),
    ):
        with pytest.raises(ValueError, match="expected a seed from 0"):
            app.side_by_side(pair, "cat", **wrong)


def test_without_gradio_it_says_what_to_install(app, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(app, "demo_pair", lambda *arguments: pytest.fail("a model is loaded"))
    with pytest.raises(SystemExit, match=r"needs gradio.*pip install 'diffusers-dq\[space\]'"):
        app.main([])


def test_the_page_can_be_built(app, pair):
    pytest.importorskip("gradio")
    labels = {part.label for part in app.build(pair).blocks.values() if getattr(part, "label", None)}
    assert {"class", "seed", "denoising steps", "full precision", "quantized", "difference"} <= labels


@pytest.mark.slow
def test_the_demo_pair_is_close_and_not_the_same(app):
    pair = app.demo_pair(calibration_steps=5)
    shown = app.side_by_side(pair, pair.labels[0], seed=0, steps=5, pictures=2)
    difference = np.abs(np.stack(shown.reference).astype(float) - np.stack(shown.quantized))
    assert 0 < difference.mean() < 10, "of 255; noise would be about 80"


def code_of_the_space() -> str:
    return (EXAMPLES / "space" / "README.md").read_text().partition("```bash\n")[2].partition("```")[0]


def test_a_space_is_told_what_it_needs():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    needed = {*project["dependencies"], *project["optional-dependencies"]["space"]}
    listed = (EXAMPLES / "space" / "requirements.txt").read_text().split("\n")
    assert {*filter(None, listed), "gradio>=6"} == needed, "gradio is what the Space itself installs, by sdk_version"
    about = RepoCard.load(EXAMPLES / "space" / "README.md").data
    assert (about.sdk, about.app_file, about.license) == ("gradio", "app.py", "apache-2.0")
    assert f"gradio=={about.sdk_version}\n" in (EXAMPLES.parent / "constraints.txt").read_text()
    assert len(about.short_description) <= 60, "or the Hub refuses it"


@pytest.mark.slow
def test_the_folder_of_a_space_is_complete_and_serves_the_page(tmp_path):
    pytest.importorskip("gradio")
    for name in ("diffusers_dq", "diffusers_dq_cli", "kernels", "examples"):
        (tmp_path / name).symlink_to(EXAMPLES.parent / name)
    subprocess.run(["bash", "-ec", code_of_the_space()], cwd=tmp_path, check=True)
    space = tmp_path / "space"
    assert not [path for path in space.rglob("*") if path.is_symlink()]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    given["GRADIO_TEMP_DIR"] = str(tmp_path / "pictures")
    show = "import app, diffusers_dq_kernels as ops; print(app.__file__, app.MODEL, ops.__file__, sep='\\n')"
    asked = subprocess.run(
        [sys.executable, "-c", show], cwd=space, env=os.environ | given, capture_output=True, text=True, check=True
    )
    assert [Path(line).is_relative_to(space) for line in asked.stdout.split()] == [True] * 3

    log = tmp_path / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "app.py"], cwd=space, env=os.environ | given, stdout=file, stderr=file
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 300
            while "Running on local URL" not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30) as page:
                assert "HTG W4A8 of a DiT for CIFAR-10" in page.read().decode()
        finally:
            process.terminate()


def test_a_pipeline_without_names_shows_the_numbers_of_its_classes(app):
    pipe = tiny_pipeline()
    assert app.names_of(pipe)[:3] == ("0", "1", "2") and len(app.names_of(pipe)) == 1000
    assert app.names_of(tiny_pixart_pipeline()) == ()


def test_a_pipeline_that_takes_prompts_is_given_the_prompt(app, monkeypatch):
    given = []

    def run(pipe, call, **settings):
        given.append(call)
        return np.full((2, 16, 16, 3), 0.25 * len(given))

    monkeypatch.setattr(app, "run_call", run)
    pipe = tiny_pixart_pipeline()
    shown = app.side_by_side(app.Pair(pipe, pipe, "tiny"), "a lighthouse", seed=0, steps=2, pictures=2)
    assert given == 2 * [{"prompt": ["a lighthouse"] * 2, "guidance_scale": 1.5}] and "PSNR" in shown.summary
