# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from diffusers_dq.evaluation import Extractor, Judges, PictureSet, measure
from diffusers_dq.evaluation.distribution import fid, inception_score, kid, precision_recall
from diffusers_dq.evaluation.figures import NAMES
from diffusers_dq.evaluation.perception import Clip, load_lpips
from diffusers_dq.evaluation.pictures import SETTINGS, batch_file
from diffusers_dq.files import write_json

RNG = np.random.default_rng(0)
real = RNG.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
made = RNG.integers(60, 256, (9, 16, 16, 3), dtype=np.uint8)


class Moments(nn.Module):
    """Mean and mean square of each channel, the picture itself, and the means as logits."""

    def __init__(self, *parts: str) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x):
        x = x.double() / 255
        pooled = torch.cat([x.mean((2, 3)), x.square().mean((2, 3))], 1)
        every = {"pooled": pooled, "spatial": x[:, 0, :4, :4], "logits": 10 * x.mean((2, 3))}
        return {name: every[name] for name in self.parts or every}


def judges(*parts, **others):
    return Judges(extractor=Extractor("moments", "-".join(parts), Moments(*parts)), batch=4, **others)


@pytest.fixture
def place(tmp_path):
    def make(name, pixels, **settings):
        if not settings:
            np.savez(tmp_path / f"{name}.npz", pixels)
            return PictureSet.open(tmp_path / f"{name}.npz")
        settings = {"images": len(pixels), "batch": 4, "seed": 0, **settings}
        for first in range(0, len(pixels), 4):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            np.savez(batch_file(folder, first), pixels[first : first + 4])
        write_json(folder / SETTINGS, settings)
        return PictureSet.open(folder)

    return make


def test_figures_of_a_set_are_those_of_its_features(place):
    figures = measure(place("made", made), judges(), reference=place("real", real), progress=False)
    x, y = (Moments()(torch.from_numpy(pixels).movedim(-1, 1)) for pixels in (made, real))
    expected = {
        "FID": fid(x["pooled"], y["pooled"]),
        "sFID": fid(x["spatial"].flatten(1), y["spatial"].flatten(1)),
        "IS": inception_score(x["logits"]),
        "KID": kid(x["pooled"], y["pooled"]),
    }
    for name, value in expected.items():
        assert figures.values[name] == pytest.approx(value, rel=1e-5, abs=1e-6), "features are kept in fp32"
    assert (figures.values["precision"], figures.values["recall"]) == precision_recall(x["pooled"], y["pooled"])
    assert set(figures.values) | set(figures.missing) == set(NAMES)
    assert not set(figures.values) & set(figures.missing)
    assert figures.missing["PSNR"] == "no pairs: give --paired-with"


def test_what_the_network_does_not_give_is_named(place):
    figures = measure(place("made", made), judges("pooled"), reference=place("real", real), progress=False)
    assert figures.missing["sFID"] == "the feature extractor gives no spatial"
    assert figures.missing["IS"] == "the feature extractor gives no logits"
    assert "FID" in figures.values
    alone = measure(place("made", made), judges(), progress=False)
    assert "IS" in alone.values and alone.missing["FID"] == "no reference set: give --reference"
    none = measure(place("made", made), Judges(why_no_features="no such luck"), progress=False)
    assert none.values == {} and none.missing["IS"] == none.missing["KID"] == "no such luck"


def test_few_pictures_are_noted_and_lack_neighbours(place):
    figures = measure(place("made", made[:3]), judges(), reference=place("real", real), progress=False)
    assert "3 nearest others need 4" in figures.missing["recall"]
    assert "3 pictures give no full-rank covariance of 6 features" in figures.notes[0]
    one = measure(place("one", made[:1]), judges(), reference=place("real", real), progress=False)
    assert one.missing["FID"] == "of 1 picture there is no distribution"


def test_pairs(place):
    a, b = made.copy(), made.copy()
    b[:8] ^= 1
    twins = {"classes": [0, 1]}
    figures = measure(place("a", a, **twins), judges("pooled"), twin=place("b", b[:9], **twins), progress=False)
    assert figures.values["PSNR"] == math.inf and "1 of 9 pairs are equal" in figures.notes[0]
    b[8] ^= 1
    distance = Judges(lpips=lambda x, y: (x - y).abs().mean((1, 2, 3)), batch=4)
    figures = measure(place("a", a, **twins), distance, twin=place("c", b, **twins), progress=False)
    # a difference of 1 of 255 everywhere; divided by 255 in fp32. LPIPS networks see [-1, 1], twice as far
    assert figures.values["PSNR"] == pytest.approx(20 * math.log10(255), rel=1e-5)
    assert figures.values["LPIPS"] == pytest.approx(2 / 255, rel=1e-5)
    assert 0.9 < figures.values["SSIM"] < 1


def test_sets_that_cannot_be_compared_are_refused(place):
    small = place("small", real[:, :8])
    with pytest.raises(ValueError, match="of 16 x 16 pixels and .* of 8 x 16; both must be of one size"):
        measure(place("made", made), judges(), reference=small, progress=False)
    with pytest.raises(ValueError, match="holds 1 picture; a distribution needs 2"):
        measure(place("made", made), judges(), reference=place("one", real[:1]), progress=False)
    with pytest.raises(ValueError, match="not sampled by diffusers-dq, so its seeds are not known"):
        measure(place("a", made, seed=1), judges(), twin=place("real", made), progress=False)
    with pytest.raises(ValueError, match="no pairs: seed 1 and 2"):
        measure(place("a", made, seed=1), judges(), twin=place("b", made, seed=2), progress=False)


class Words:
    """A processor: a token a letter, pixels as they are."""

    def __call__(self, text, images, **options):
        return self.Inputs(
            input_ids=torch.tensor([[1 + ord(letter) % 30 for letter in word] + [2] for word in text]),
            pixel_values=torch.from_numpy(np.stack(images)).movedim(-1, 1) / 255,
        )

    class Inputs(dict):
        def to(self, device):
            return self


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    text = dict(sizes, vocab_size=40, max_position_embeddings=8, bos_token_id=0, eos_token_id=2)
    config = CLIPConfig(text_config=text, vision_config=dict(sizes, image_size=16, patch_size=8), projection_dim=8)
    return Clip(CLIPModel(config), Words())


def test_the_clip_score_is_the_mean_cosine_of_pictures_and_their_prompts(place, clip):
    prompts = ["cat", "dog"]
    figures = measure(place("made", made), Judges(clip=clip, batch=4), prompts=prompts, progress=False)
    inputs = Words()([prompts[i % 2] for i in range(9)], list(made))
    with torch.no_grad():
        images = clip.model.get_image_features(pixel_values=inputs["pixel_values"])
        texts = clip.model.get_text_features(input_ids=inputs["input_ids"])
    images, texts = (getattr(output, "pooler_output", output) for output in (images, texts))
    expected = 100 * torch.cosine_similarity(images, texts).clamp(min=0).mean()
    assert expected > 0
    assert figures.values["CLIP"] == pytest.approx(float(expected), rel=1e-4)  # fp32, other batches
    without = measure(place("made", made), Judges(clip=clip), progress=False)
    assert without.missing["CLIP"] == "the pictures have no prompts"


def test_networks_that_cannot_be_had_say_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"--clip .*no CLIP model could be loaded \(.*give a folder of one"):
        Clip.load(str(tmp_path))
    with pytest.raises(ValueError, match="--lpips 'vgg': expected path/to/file.py:function"):
        load_lpips("vgg")


def test_a_distance_that_gives_no_number_a_pair_is_refused(place):
    settings = {"classes": [0]}
    bad = Judges(lpips=lambda x, y: (x - y).abs().mean(), batch=4)
    with pytest.raises(ValueError, match=r"made \[\] of 4 pairs"):
        measure(place("a", made, **settings), bad, twin=place("b", made, **settings), progress=False)
