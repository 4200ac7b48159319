# SPDX-License-Identifier: Apache-2.0
"""Scores of networks that see somewhat as people do: CLIP of a picture and its prompt, LPIPS of two pictures."""

import importlib
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from diffusers_dq.evaluation.features import load_entry
from diffusers_dq.evaluation.metrics import Array
from diffusers_dq.evaluation.pictures import Pixels

Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
ALEX = "alex"


class Clip:
    """The CLIP score 100 max(cos(picture, prompt), 0) (Hessel et al., 2021, Section 3; w = 100 as in torchmetrics).

    model, processor: transformers' CLIPModel and CLIPProcessor.
    """

    def __init__(self, model: Any, processor: Any, device: str | torch.device = "cpu") -> None:
        self.model, self.processor, self.device = model.to(device).eval(), processor, device

    @classmethod
    def load(cls, name: str, device: str | torch.device = "cpu") -> "Clip":
        """A local folder or a name on the Hub. Raises ValueError where it cannot be had."""
        try:
            transformers = importlib.import_module("transformers")
            model = transformers.CLIPModel.from_pretrained(name)
            return cls(model, transformers.CLIPProcessor.from_pretrained(name), device)
        except (ImportError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"--clip {name}: no CLIP model could be loaded ({reason}); give a folder of one"
            ) from error

    @torch.no_grad()
    def score(self, pixels: Pixels, prompts: list[str]) -> Array:
        """pixels: [b, H, W, 3].   Returns [b] fp64."""
        inputs = self.processor(
            text=prompts, images=list(pixels), return_tensors="pt", padding=True, truncation=True
        ).to(self.device)
        output = self.model(**inputs)
        images, texts = (embeds.double() for embeds in (output.image_embeds, output.text_embeds))
        return 100 * nn.functional.cosine_similarity(images, texts).clamp(min=0).cpu().numpy()


def load_lpips(entry: str) -> Distance:
    """alex (torchmetrics' own, which needs torchvision) or an entry `file.py:function` that returns an nn.Module: two
    [b, 3, H, W] fp32 in [-1, 1] to [b]. Raises ValueError where it cannot be had."""
    if entry != ALEX:
        module = load_entry(entry, "--lpips")
        if not callable(module):
            raise ValueError(f"--lpips {entry} returned a {type(module).__name__}; expected an nn.Module")
        return module.eval() if isinstance(module, nn.Module) else module
    try:
        image = importlib.import_module("torchmetrics.image.lpip")
        metric = image.LearnedPerceptualImagePatchSimilarity(net_type="alex")
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"LPIPS with AlexNet is not to be had here ({reason}); it needs torchvision, or give --lpips"
            " path/to/file.py:function"
        ) from error
    return lambda x, y: torch.stack([metric.to(x.device)(a[None], b[None]) for a, b in zip(x, y, strict=True)])


@torch.no_grad()
def lpips(distance: Distance, a: Pixels, b: Pixels, device: str | torch.device = "cpu") -> Array:
    """a, b: [n, H, W, 3].   Returns [n] fp64. Raises ValueError for a distance that gives no number a pair."""
    if isinstance(distance, nn.Module):
        distance.to(device)
    x, y = (_signed(pixels).to(device) for pixels in (a, b))
    value = distance(x, y)
    if value.numel() != len(a):
        raise ValueError(f"the LPIPS network made {list(value.shape)} of {len(a)} pairs; expected one number a pair")
    return value.reshape(-1).double().cpu().numpy()


def _signed(pixels: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).movedim(-1, 1).float() / 127.5 - 1
