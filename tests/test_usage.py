# SPDX-License-Identifier: Apache-2.0
"""The code of cards, of every pipeline with a transformer that diffusers has: signatures only, no weights."""

import ast
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline, FluxPipeline, WanImageToVideoPipeline
from PIL import Image

from diffusers_dq.denoise import DENOISERS
from diffusers_dq.opensora import OpenSoraPipeline
from diffusers_dq.usage import (
    PICTURE,
    example,
    literal,
    loading,
    output_field,
    pipeline_code,
    pipeline_tag,
    saved_as,
    transformer_code,
)

HUB_TAGS = {  # of the pipelines that diffusers could be, as the Hub's search has them
    "audio-to-audio",
    "image-to-image",
    "image-to-video",
    "text-to-audio",
    "text-to-image",
    "text-to-video",
    "unconditional-image-generation",
    "video-to-video",
}


def pipelines() -> list[type[DiffusionPipeline]]:
    found = []
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name)
        if isinstance(kind, type) and issubclass(kind, DiffusionPipeline) and kind is not DiffusionPipeline:
            parts = inspect.signature(kind.__init__).parameters
            if set(DENOISERS) & set(parts):
                found.append(kind)
    return [*found, OpenSoraPipeline]


ALL = pipelines()


def code_of(kind: type, call: dict | None = None) -> str:
    literals, inputs = example(kind, call)
    return pipeline_code("diffusers", kind.__name__, loading("a/b"), literals, inputs, saved_as(kind))


def call_in(code: str) -> dict[str, ast.expr]:
    (call,) = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "pipe"]
    return {str(keyword.arg): keyword.value for keyword in call.keywords}


def test_there_are_pipelines_to_test():
    assert len(ALL) > 100


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_the_call_is_one_the_pipeline_takes(kind):
    """All that has no default is there, nothing else than it takes, and every name in the code is known to it."""
    code = code_of(kind)
    inspect.signature(kind.__call__).bind(None, **call_in(code))
    tree = ast.parse(code)
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
    }
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    unknown = {node.id for node in names} - imported - assigned - {"enumerate", "getattr"}
    assert (
        not unknown
        and {"soundfile"} & imported <= {"soundfile"}
        and imported - {kind.__name__, "torch", "diffusers_dq"}
        <= {
            "load_image",
            "load_video",
            "export_to_video",
            "soundfile",
        }
    )
    assert all(hasattr(diffusers.utils, name) for name in imported & {"load_image", "load_video", "export_to_video"})


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_the_tag_is_one_of_the_hub_and_fits_what_is_saved(kind):
    tag, field = pipeline_tag(kind), output_field(kind)
    assert tag in HUB_TAGS if field else tag is None
    if field:
        assert (tag.split("-")[2:3] or ["image"])[0].rstrip("s") in {
            "images": "image",
            "image": "image",
            "frames": "video",
            "video": "video",
            "audios": "audio",
        }[field] or tag == "unconditional-image-generation"
        assert f"output.{field}" in code_of(kind)


@pytest.mark.parametrize(
    "name, tag, inputs, saved",
    [
        ("DiTPipeline", "unconditional-image-generation", [], "output.images[0].save"),
        ("PixArtSigmaPipeline", "text-to-image", [], "output.images[0].save"),
        ("FluxPipeline", "text-to-image", [], "output.images[0].save"),
        ("FluxImg2ImgPipeline", "image-to-image", ["image"], "output.images[0].save"),
        ("FluxInpaintPipeline", "image-to-image", ["image", "mask_image"], "output.images[0].save"),
        ("FluxControlPipeline", "image-to-image", ["control_image"], "output.images[0].save"),
        ("FluxKontextPipeline", "image-to-image", ["image"], "output.images[0].save"),
        ("QwenImageEditPipeline", "image-to-image", ["image"], "output.images[0].save"),
        ("QwenImageLayeredPipeline", "image-to-image", ["image"], "layer.save"),
        ("Kandinsky5T2IPipeline", "text-to-image", [], "output.image[0].save"),
        ("WanPipeline", "text-to-video", [], "export_to_video(output.frames[0]"),
        ("WanImageToVideoPipeline", "image-to-video", ["image"], "export_to_video(output.frames[0]"),
        ("WanVideoToVideoPipeline", "video-to-video", ["video"], "export_to_video(output.frames[0]"),
        ("CogVideoXPipeline", "text-to-video", [], "export_to_video(output.frames[0]"),
        ("LattePipeline", "text-to-video", [], "export_to_video(output.frames[0]"),
        ("LTX2HDRPipeline", "text-to-video", [], "torch.save(output.frames"),
        ("StableAudioPipeline", "text-to-audio", [], "soundfile.write"),
        ("StableAudio3AudioToAudioPipeline", "audio-to-audio", ["audio"], "soundfile.write"),
        ("OpenSoraPipeline", "text-to-video", [], "export_to_video(output.frames[0]"),
    ],
)
def test_of_pipelines_that_are_known(name, tag, inputs, saved):
    kind = OpenSoraPipeline if name == "OpenSoraPipeline" else getattr(diffusers, name)
    assert pipeline_tag(kind) == tag and saved in code_of(kind)
    assert sorted(example(kind, None)[1]) == inputs


def test_strings_are_quoted():
    prompt = "a \"lighthouse\"\nin 'a' storm\\ <!-- diffusers_dq: end -->"
    code = code_of(FluxPipeline, {"prompt": prompt, "num_inference_steps": 2})
    assert "<!--" not in code
    given = {name: ast.literal_eval(value) for name, value in call_in(code).items() if name != "generator"}
    assert given == {"prompt": prompt, "num_inference_steps": 2}
    assert eval(literal(["<!-- x", {"a": None}])) == ["<!-- x", {"a": None}]


def test_pictures_are_loaded_from_where_the_call_says():
    assert f'image = load_image("{PICTURE}")' in code_of(FluxImg2ImgPipeline)
    code = code_of(WanImageToVideoPipeline, {"image": 'my "cat".png', "last_image": "last.png", "prompt": "x"})
    assert 'image = load_image("my \\"cat\\".png")' in code and 'last_image = load_image("last.png")' in code
    assert list(call_in(code)) == ["prompt", "image", "last_image", "generator"]


def test_what_cannot_be_made_up_is_left_open():
    code = code_of(diffusers.VisualClozePipeline)
    assert "task_prompt = ...  # yours: VisualClozePipeline says what it takes" in code


def test_where_it_is_loaded_from():
    assert loading("a/b") == '"a/b"'
    arguments = loading("a/b", revision='w"4', subfolder="x/y", dtype="bfloat16")
    assert arguments == '"a/b", revision="w\\"4", subfolder="x/y", dtype=torch.bfloat16'
    code = transformer_code("diffusers", "DiTTransformer2DModel", arguments)
    assert code.startswith("import torch\n") and ast.parse(code)
    assert "import torch" not in transformer_code("diffusers", "DiTTransformer2DModel", loading("a/b"))


class Stub:
    """A pipeline of a kind whose call must fit its signature, and gives the output that it is made with."""

    def __init__(self, kind: type, output: Any) -> None:
        self.kind, self.output, self.given = kind, output, {}
        self.vae = SimpleNamespace(config=SimpleNamespace(sampling_rate=44100))

    def to(self, device: str) -> None:
        self.device = device

    def __call__(self, **given: Any) -> Any:
        inspect.signature(self.kind.__call__).bind(None, **given)
        self.given = given
        return self.output


@pytest.mark.parametrize(
    "name, output, file",
    [
        ("FluxImg2ImgPipeline", {"images": [Image.new("RGB", (2, 2))]}, "image.png"),
        ("Kandinsky5T2IPipeline", {"image": [Image.new("RGB", (2, 2))]}, "image.png"),
        ("QwenImageLayeredPipeline", {"images": [[Image.new("RGBA", (2, 2))] * 2]}, "layer1.png"),
        ("WanImageToVideoPipeline", {"frames": np.zeros((1, 2, 2, 2, 3))}, "video.mp4"),
        ("Cosmos3OmniPipeline", {"video": [Image.new("RGB", (2, 2))]}, "video.mp4"),
        ("LTX2HDRPipeline", {"frames": torch.zeros(1, 2)}, "frames.pt"),
        ("StableAudioPipeline", {"audios": torch.zeros(1, 2, 8)}, "audio.wav"),
        ("LongCatAudioDiTPipeline", {"audios": np.zeros((1, 1, 8))}, "audio.wav"),
    ],
)
def test_the_code_runs_and_saves(name, output, file, tmp_path, monkeypatch):
    """Without the weights and the encoders of video and sound; a picture is a file here, not of the documentation."""
    kind = getattr(diffusers, name)
    stub, loaded, written = Stub(kind, SimpleNamespace(**output)), [], []
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 3)).save("mine.png")
    monkeypatch.setattr(kind, "from_pretrained", lambda *given, **more: loaded.append((given, more)) or stub)
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda frames, path: written.append((len(frames), path)))
    sound = SimpleNamespace(write=lambda path, values, rate: written.append((values.shape, rate, path)))
    monkeypatch.setitem(sys.modules, "soundfile", sound)
    call = {"image": "mine.png"} if "image" in inspect.signature(kind.__call__).parameters else {}
    exec(code_of(kind, call), {})
    assert loaded == [(("a/b",), {})] and "generator" in stub.given
    assert not call or stub.given["image"].size == (4, 3)
    if file == "video.mp4":
        assert written == [(len(output.get("video", [0, 0])), file)]
    elif file == "audio.wav":
        channels = output["audios"].shape[1]
        assert written == [((8, channels), 44100, file)]
    else:
        assert (tmp_path / file).stat().st_size > 0
