# SPDX-License-Identifier: Apache-2.0
"""The Python that uses a model: what a pipeline's call needs, how its output is saved, and the Hub's name for it."""

import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

_SAMPLES = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/diffusers"
PICTURE, MASK, VIDEO = f"{_SAMPLES}/cat.png", f"{_SAMPLES}/inpaint_mask.png", f"{_SAMPLES}/hiker.mp4"
PROMPT = "a lighthouse in a storm"
_IMAGE, _IMAGES, _CLIP = re.compile(r"(\w+_)?image|mask|control_mask"), re.compile(r"(\w+_)?images"), r"(\w+_)?video"
_FROM_VIDEO = re.compile(r"VideoToVideo|Video2Video|V2V")
_IMAGE_TO_VIDEO = re.compile(r"ImageToVideo|Image2Video|(?<!T)I2V|VideoToWorld")
_IMAGE_TO_IMAGE = re.compile(r"Img2Img|ImageToImage|I2I|Inpaint|Edit|Kontext|Fill|Upscale|Refiner|Layered")
_ALWAYS = ("control_image", "control_mask", "mask_image", "control_video")  # None is only their default
_SAVED = ("images", "image", "frames", "video", "audios")


def pipeline_tag(kind: type) -> str | None:
    """The Hub's name for what a class of pipelines does, by what its call requires, its name and its output; None
    where the Hub has no name for it."""
    takes, required = _takes(kind), _required(kind)
    output, name = output_field(kind), kind.__name__
    if output == "audios":
        return "audio-to-audio" if "audio" in takes else "text-to-audio"
    if output in ("frames", "video"):
        clips = any(_loader(argument) == "load_video" for argument in required)
        if clips or _FROM_VIDEO.search(name) or "Inpaint" in name or "control_video" in takes:
            return "video-to-video"
        if _IMAGE_TO_VIDEO.search(name) or "image" in required:
            return "image-to-video"
        return "text-to-video" if "prompt" in takes else None
    if output in ("images", "image"):
        if _IMAGE_TO_IMAGE.search(name) or "image" in required or {"control_image", "mask_image"} & set(takes):
            return "image-to-image"
        if "prompt" in takes:
            return "text-to-image"
        return "image-to-image" if "image" in takes else "unconditional-image-generation"
    return None


def output_field(kind: type) -> str:
    """The field of the output that is to be saved; "" where neither the call's code nor that of the class's other
    functions names an output with such a field."""
    own = kind.__mro__[: kind.__mro__.index(DiffusionPipeline)]
    helpers = [part for owner in own for part in vars(owner).values() if inspect.isfunction(part)]
    functions: list[Any] = [kind.__call__, *helpers]
    for function in map(inspect.unwrap, functions):
        for name in function.__code__.co_names:
            output = function.__globals__.get(name)
            if isinstance(output, type) and issubclass(output, BaseOutput) and is_dataclass(output):
                found = [field.name for field in fields(output) if field.name in _SAVED]
                if found:
                    return found[0]
    return ""


def example(kind: type, call: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, str]]:
    """(literals, inputs) of a call that has all that the class needs.

    call: what is to be in it; None: a prompt, or the first class. Of a picture or a video its path or URL.
    inputs: by argument the path or URL of a picture or a video, one of diffusers' documentation where the call has
        none; "" for what cannot be made up, which the code leaves open.

    Raises ValueError for an argument that the class does not take, and for what cannot be written down.
    """
    takes = _takes(kind)
    literals: dict[str, Any] = {}
    if "prompt" in takes:
        literals["prompt"] = PROMPT
    elif "class_labels" in takes:
        literals["class_labels"] = [0]
    inputs: dict[str, str] = {}
    for name, value in (call or {}).items():
        if name not in takes:
            raise ValueError(f"call sets {name}, which {kind.__name__} does not take")
        if _loader(name) and isinstance(value, str):
            inputs[name] = value
        elif not _is_literal(value):
            raise ValueError(f"call[{name!r}] is written into the card as Python; expected literals, got {value!r}")
        else:
            literals[name] = value
    for name in _needed(kind):
        if name not in literals and name not in inputs:
            inputs[name] = "" if _prompts_of_its_own(kind) else _sample(name)
    return literals, inputs


def _needed(kind: type) -> list[str]:
    """Also what has the default None, and is refused as such: a pipeline that edits a picture asks for one."""
    takes, tag = _takes(kind), pipeline_tag(kind)
    needed = [*_required(kind), *(name for name in _ALWAYS if name in takes)]
    if tag in ("image-to-image", "image-to-video"):
        needed += [name for name in ("image", "images", "cond_image") if name in takes]
    if tag == "video-to-video":
        needed += [
            name for name in ("video", *(["mask_video"] if "Inpaint" in kind.__name__ else [])) if name in takes
        ]
    if tag == "audio-to-audio":
        needed.append("audio")
    return list(dict.fromkeys([*needed, *_prompts_of_its_own(kind)]))


def _prompts_of_its_own(kind: type) -> list[str]:
    """Of a pipeline without `prompt`: they tell how its pictures are nested, and neither can be made up."""
    takes = _takes(kind)
    own = [name for name in takes if name.endswith("_prompt") and not name.startswith(("negative", "num_"))]
    return [] if "prompt" in takes else own


def _takes(kind: type) -> list[str]:
    return list(inspect.signature(kind.__call__).parameters)[1:]


def _required(kind: type) -> list[str]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(kind.__call__).parameters.values())[1:]
    return [p.name for p in parameters if p.default is p.empty and p.kind in named]


def _loader(name: str) -> str:
    if _IMAGE.fullmatch(name) or _IMAGES.fullmatch(name):
        return "load_image"
    return "load_video" if re.fullmatch(_CLIP, name) else ""


def _sample(name: str) -> str:
    if "mask" in name:
        return MASK if _loader(name) == "load_image" else ""
    return {"load_image": PICTURE, "load_video": VIDEO, "": ""}[_loader(name)]


def _is_literal(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_literal, value))
    if isinstance(value, dict):
        return all(_is_literal(part) for pair in value.items() for part in pair)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or type(value) in (bool, int, str)


def literal(value: Any) -> str:
    """Python of it, in which no HTML comment begins: a card's markers are such."""
    return repr(value).replace("<!--", "\\x3c!--")


def quoted(text: str) -> str:
    """A string of Python in double quotes."""
    return json.dumps(text, ensure_ascii=False).replace("<!--", "\\x3c!--")


def loading(repo_id: str, *, revision: str = "", subfolder: str = "", dtype: str = "float32") -> str:
    """Arguments of `from_pretrained`."""
    given = [quoted(repo_id)]
    if revision:
        given.append(f"revision={quoted(revision)}")
    if subfolder:
        given.append(f"subfolder={quoted(subfolder)}")
    if dtype != "float32":
        given.append(f"dtype=torch.{dtype}")
    return ", ".join(given)


def transformer_code(library: str, kind: str, arguments: str) -> str:
    """arguments: of `loading`."""
    head = ["import torch"] if "torch." in arguments else []
    return "\n".join(
        [
            *head,
            "import diffusers_dq  # makes diffusers know the quantization method",
            f"from {library} import {kind}",
            "",
            f"transformer = {kind}.from_pretrained({arguments})",
            "print(diffusers_dq.inspect(transformer))",
        ]
    )


def pipeline_code(
    library: str, kind: str, arguments: str, call: Mapping[str, Any], inputs: Mapping[str, str], returns: str
) -> str:
    """arguments: of `loading`.   call, inputs: of `example`.   returns: of `saved_as`."""
    needs = {_loader(name) for name, source in inputs.items() if source} - {""}
    if returns in ("frames", "video"):
        needs.add("export_to_video")
    given = [*(f"{name}={literal(value)}" for name, value in call.items()), *(f"{name}={name}" for name in inputs)]
    return "\n".join(
        [
            *(["import soundfile  # pip install soundfile"] if returns == "audios" else []),
            "import torch",
            "import diffusers_dq  # makes diffusers know the quantization method",
            f"from {library} import {kind}",
            *([f"from diffusers.utils import {', '.join(sorted(needs))}"] if needs else []),
            "",
            f"pipe = {kind}.from_pretrained({arguments})",
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
            *_inputs(kind, inputs),
            f"output = pipe({', '.join([*given, 'generator=torch.manual_seed(0)'])})",
            *_saving(returns),
        ]
    )


def saved_as(kind: type) -> str:
    """How its output is saved: `output_field`, "layers" for a list of pictures each, "tensor:<field>" for what is no
    picture by default, "" for what is not known."""
    field = output_field(kind)
    parameters = inspect.signature(kind.__call__).parameters
    form = parameters["output_type"].default if "output_type" in parameters else "pil"
    if field not in ("", "audios") and form not in ("pil", "np"):
        return f"tensor:{field}"
    return "layers" if field == "images" and "Layered" in kind.__name__ else field


def _inputs(kind: str, inputs: Mapping[str, str]) -> Iterable[str]:
    for name, source in inputs.items():
        load = f"{_loader(name)}({quoted(source)})"
        if not source:
            yield f"{name} = ...  # yours: {kind} says what it takes"
        else:
            yield f"{name} = [{load}]" if _IMAGES.fullmatch(name) else f"{name} = {load}"


def _saving(returns: str) -> list[str]:
    if returns.startswith("tensor:"):
        field = returns.removeprefix("tensor:")
        return [f'torch.save(output.{field}, "{field}.pt")']
    return {
        "images": ['output.images[0].save("image.png")'],
        "image": ['output.image[0].save("image.png")'],
        "layers": [
            "for number, layer in enumerate(output.images[0]):",
            '    layer.save(f"layer{number}.png")',
        ],
        "frames": ['export_to_video(output.frames[0], "video.mp4")'],
        "video": ['export_to_video(output.video, "video.mp4")'],
        "audios": [
            'rate = getattr(pipe, "sample_rate", None) or pipe.vae.config.sampling_rate',
            'soundfile.write("audio.wav", torch.as_tensor(output.audios[0]).float().cpu().numpy().T, rate)',
        ],
        "": [],
    }[returns]


__all__ = [
    "example",
    "literal",
    "loading",
    "output_field",
    "pipeline_code",
    "pipeline_tag",
    "quoted",
    "saved_as",
    "transformer_code",
]
