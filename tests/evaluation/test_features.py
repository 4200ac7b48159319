# SPDX-License-Identifier: Apache-2.0
import sys
import urllib.error
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_dq.evaluation import Extractor, PictureSet
from diffusers_dq.evaluation.features import Inception, cache_file, features_of

pixels = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)

CODE = '''
from pathlib import Path
import torch
from torch import nn

class Small(nn.Module):
    """A random convolution."""
    def __init__(self, channels):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, channels, 3)
    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        maps = self.convolution(pixels / 255)
        return self.parts(maps)
    def parts(self, maps):
        return {"pooled": maps.mean((2, 3)), "spatial": maps[:, :1], "logits": maps.amax((2, 3))}

def small():
    return Small(4)

def trained():
    network = Small(4)
    with torch.no_grad():
        network.convolution.bias += float(Path(__file__).with_name("bias.txt").read_text())
    return network

class Tuple(Small):
    def parts(self, maps):
        return maps.mean((2, 3)), None, None

def pair():
    return Tuple(4)

class Wrong(Small):
    def parts(self, maps):
        return {"pooled": maps.mean()}

def wrong():
    return Wrong(4)

def number():
    return 5
'''


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "network.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def pictures(tmp_path):
    np.savez(tmp_path / "set.npz", pixels)
    return PictureSet.open(tmp_path / "set.npz")


def test_a_network_of_a_file_sees_pictures_in_any_batches(code, pictures):
    extractor = Extractor.load(f"{code}:small")
    features = features_of(pictures, extractor, batch=3, progress=False)
    assert {name: part.shape for name, part in features.items()} == {
        "pooled": (7, 4),
        "spatial": (7, 12),
        "logits": (7, 4),
    }
    maps = extractor.module.convolution(torch.from_numpy(pixels).movedim(-1, 1) / 255)
    np.testing.assert_allclose(features["spatial"], maps[:, :1].flatten(1).detach(), rtol=1e-5, atol=1e-6)  # fp32 sums
    missing = features_of(pictures, Extractor.load(f"{code}:pair"), progress=False)
    assert list(missing) == ["pooled"], "a tuple, with None for what there is not"
    np.testing.assert_allclose(missing["pooled"], features["pooled"], rtol=1e-5, atol=1e-6)


def test_features_are_kept_beside_the_set_until_something_changes(code, pictures, monkeypatch):
    extractor = Extractor.load(f"{code}:small")
    first = features_of(pictures, extractor, progress=False)
    assert cache_file(pictures, extractor) == pictures.place.parent / f"set.features-{extractor.key}.npz"

    with monkeypatch.context() as patch:
        patch.setattr(Extractor, "of", lambda *args: pytest.fail("computed again"))
        again = features_of(pictures, Extractor.load(f"{code}:small"), progress=False)
    assert all(np.array_equal(again[name], part) for name, part in first.items())

    np.savez(pictures.place, 255 - pixels)
    changed = features_of(PictureSet.open(pictures.place), extractor, progress=False)
    assert not np.array_equal(changed["pooled"], first["pooled"])
    cache_file(pictures, extractor).write_bytes(b"damaged")
    assert np.array_equal(features_of(pictures, extractor, progress=False)["pooled"], changed["pooled"])


def test_the_key_is_of_weights_and_code(code, tmp_path):
    def key(name):
        return Extractor.load(f"{code}:{name}").key

    def trained(bias):
        (tmp_path / "bias.txt").write_text(bias)
        return key("trained")

    keys = [key("small"), key("pair"), trained("0.5"), trained("0.25")]
    assert len(set(keys)) == 4 and trained("0.5") == keys[2]
    code.write_text(CODE.replace("pixels / 255", "pixels / 128"))
    assert Extractor.load(f"{code}:small").key != keys[0]


def test_a_place_that_cannot_be_written_is_told_and_costs_no_figure(code, pictures, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("diffusers_dq.evaluation.features.write_whole", refuse)
    told: list[str] = []
    assert features_of(pictures, Extractor.load(f"{code}:small"), progress=False, warn=told.append)
    assert len(told) == 1 and "Permission denied" in told[0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("network", "expected path/to/file.py:function or module:function"),
        ("missing.py:small", "cannot be imported"),
        ("no_such_module:small", "No module named 'no_such_module'"),
        ("{code}:none", "has no attribute 'none'"),
        ("{code}:number", "returned a int; an extractor is an nn.Module"),
    ],
)
def test_an_entry_that_gives_no_network_is_an_error(code, entry, message):
    with pytest.raises(ValueError, match=message):
        Extractor.load(entry.format(code=code))


def test_features_that_are_not_rows_are_refused(code, pictures):
    with pytest.raises(ValueError, match=r"made {'pooled': \[\]} of 7 pictures; expected pooled, spatial, logits"):
        features_of(pictures, Extractor.load(f"{code}:wrong"), progress=False)


def test_features_that_are_not_finite_are_refused(pictures):
    class Broken(nn.Module):
        def forward(self, x):
            return {"pooled": x.float().mean((2, 3)) / 0}

    with pytest.raises(ValueError, match="pooled features of .*set.npz by broken are not finite"):
        features_of(pictures, Extractor("broken", "0", Broken()), progress=False)


def test_without_inception_the_error_says_how_to_do_without(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"(?s)not to be had here \(.*pip install torch-fidelity.*or give --features"):
        Extractor.load("inception")


class StandIn(nn.Module):
    """The shape of torch-fidelity's network, with nothing learned."""

    def __init__(self, *args: object) -> None:
        super().__init__()
        self.args = args
        self.Mixed_6d = nn.ModuleDict({"branch1x1": nn.Conv2d(3, 192, 1)})

    def forward(self, pixels):
        maps = self.Mixed_6d["branch1x1"](pixels / 255)
        return maps.mean((2, 3)), maps.amax((2, 3))


def test_inception_gives_seven_spatial_channels_and_loads_no_pickle(monkeypatch, tmp_path):
    fidelity, calls = ModuleType("feature_extractor_inceptionv3"), []
    fidelity.URL_INCEPTION_V3 = "https://example.org/weights-0a.pth"
    fidelity.FeatureExtractorInceptionV3 = StandIn
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", fidelity)
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: calls.append(options))
    extractor = Extractor.load("inception")
    assert isinstance(extractor.module, Inception) and calls[0]["weights_only"] is True
    assert extractor.module.network.args[2] == str(tmp_path / "checkpoints" / "weights-0a.pth")
    parts = extractor.of(pixels, "cpu")
    assert {name: part.shape[1] for name, part in parts.items()} == {
        "pooled": 192,
        "spatial": 7 * 6 * 5,
        "logits": 192,
    }
    maps = extractor.module.network.Mixed_6d["branch1x1"](torch.from_numpy(pixels).movedim(-1, 1) / 255)
    assert torch.equal(parts["spatial"], maps[:, :7].flatten(1))

    def offline(url, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(ValueError, match="no network.*give --features"):
        Extractor.load("inception")
