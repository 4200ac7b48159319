# SPDX-License-Identifier: Apache-2.0
"""What a network sees in pictures, kept beside the set it was computed from.

An extractor is an nn.Module that maps uint8 [b, 3, H, W] to a dict of floating-point tensors, or to a tuple of them in
this order with None for what is missing:
    pooled: [b, D], for FID, KID, precision and recall.
    spatial: [b, ...], flattened here, for sFID.
    logits: [b, C], before the softmax, for the Inception Score.
"""

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_dq.evaluation.pictures import DAMAGED_ZIP, PictureSet
from diffusers_dq.evaluation.sampling import module_fingerprint
from diffusers_dq.files import write_whole

PARTS = ("pooled", "spatial", "logits")
INCEPTION = "inception"
_SPATIAL_CHANNELS = 7  # of ADM's sFID: 7 x 17 x 17 = 2023 numbers, about as many as the 2048 pooled ones


@dataclass(frozen=True)
class Extractor:
    """name: as given.   key: of the network, its code and its weights."""

    name: str
    key: str
    module: nn.Module

    @classmethod
    def load(cls, entry: str) -> "Extractor":
        """inception, or an entry `path/to/file.py:function` or `module:function` that returns an extractor.

        The entry runs the code it names. Raises ValueError where it cannot be had, with what to do.
        """
        if entry == INCEPTION:
            module = _inception()
            return cls(entry, module_fingerprint(module), module)
        module = load_entry(entry, "--features")
        if not isinstance(module, nn.Module):
            raise ValueError(f"{entry} returned a {type(module).__name__}; an extractor is an nn.Module")
        source = entry.rpartition(":")[0]
        code = Path(source).read_bytes() if source.endswith(".py") else source.encode()
        key = hashlib.sha256(code + entry.rpartition(":")[2].encode() + module_fingerprint(module).encode())
        return cls(entry, key.hexdigest()[:16], module.eval())

    @torch.no_grad()
    def of(self, pixels: npt.NDArray[np.uint8], device: str | torch.device) -> dict[str, Tensor]:
        """pixels: [b, H, W, 3].   Returns the parts there are, [b, ...] fp32 on the CPU, flat."""
        module = self.module.to(device)
        output = module(torch.from_numpy(pixels).movedim(-1, 1).contiguous().to(device))
        if not isinstance(output, Mapping):
            output = dict(zip(PARTS, output, strict=False)) if isinstance(output, tuple) else {"pooled": output}
        parts = {name: part for name, part in output.items() if part is not None}
        wrong = [name for name, part in parts.items() if name not in PARTS or not _is_rows(part, len(pixels))]
        if wrong or not parts:
            shapes = {name: list(getattr(part, "shape", [])) for name, part in parts.items()}
            raise ValueError(
                f"{self.name} made {shapes or 'nothing'} of {len(pixels)} pictures; expected {', '.join(PARTS)} or"
                " some of them, floating point, one row a picture"
            )
        return {name: part.flatten(1).float().cpu() for name, part in parts.items()}


def _is_rows(part: Any, rows: int) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point() and part.ndim >= 2 and len(part) == rows


def load_entry(entry: str, option: str) -> Any:
    """What `path/to/file.py:function` or `module:function` returns. Raises ValueError where there is no such thing."""
    source, _, name = entry.rpartition(":")
    if not source or not name:
        raise ValueError(f"{option} {entry!r}: expected path/to/file.py:function or module:function")
    try:
        function = getattr(_module_of(source), name)
    except (ImportError, FileNotFoundError, SyntaxError, AttributeError) as error:
        raise ValueError(f"{option} {entry!r} cannot be imported: {error}") from error
    return function()


def _module_of(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _inception() -> nn.Module:
    """The Inception of FID (TensorFlow's graph of 2015, in torch-fidelity's form), with ADM's spatial features."""
    try:
        fidelity = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        url = fidelity.URL_INCEPTION_V3
        torch.hub.load_state_dict_from_url(url, weights_only=True, check_hash=True, map_location="cpu")
        weights = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        names = ["2048", "logits_unbiased"]
        return Inception(fidelity.FeatureExtractorInceptionV3("inception-v3-compat", names, str(weights)))
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the Inception network is not to be had here ({reason}); pip install torch-fidelity and let it download"
            " its weights once, or give --features path/to/file.py:function, which returns another network"
        ) from error


class Inception(nn.Module):
    """network: uint8 [b, 3, H, W] to pooled [b, 2048] and logits [b, 1008]; the first 7 channels of its
    `Mixed_6d.branch1x1`, [b, 192, 17, 17], are what ADM's suite calls mixed_6/conv and takes for sFID."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._spatial: Tensor | None = None
        network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._spatial = output[:, :_SPATIAL_CHANNELS]

    def forward(self, pixels: Tensor) -> dict[str, Tensor | None]:
        pooled, logits = self.network(pixels)
        return {"pooled": pooled, "spatial": self._spatial, "logits": logits}


def features_of(
    pictures: PictureSet,
    extractor: Extractor,
    *,
    batch: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
    warn: Callable[[str], None] = lambda message: None,
) -> dict[str, npt.NDArray[np.float32]]:
    """The parts of the extractor for a whole set, [n, D] fp32.

    Kept in a file beside the set and read from there when neither pictures nor extractor have changed; where the place
    cannot be written, `warn` is told and nothing is kept. Raises ValueError as `Extractor.of` and for features that
    are not finite.
    """
    file = cache_file(pictures, extractor)
    stamp = pictures.stamp()
    kept = _read(file, stamp, len(pictures))
    if kept is not None:
        return kept
    rows: dict[str, list[npt.NDArray[np.float32]]] = {}
    with tqdm(total=len(pictures), desc="features", unit="picture", disable=not progress) as bar:
        for pixels in pictures.batches(batch):
            for name, part in extractor.of(pixels, device).items():
                rows.setdefault(name, []).append(part.numpy())
            bar.update(len(pixels))
    features = {name: np.concatenate(parts) for name, parts in rows.items()}
    for name, values in features.items():
        if not np.isfinite(values).all():
            raise ValueError(f"the {name} features of {pictures.place} by {extractor.name} are not finite")
    content: dict[str, Any] = {"stamp": np.array(stamp), **features}
    try:
        write_whole(file, lambda out: np.savez(out, **content))
    except OSError as error:
        warn(f"the features of {pictures.place} are not kept: {error}")
    return features


def cache_file(pictures: PictureSet, extractor: Extractor) -> Path:
    """Inside a folder of pictures, beside an .npz file."""
    name = f"features-{extractor.key}.npz"
    if pictures.place.is_dir():
        return pictures.place / name
    return pictures.place.with_name(f"{pictures.place.stem}.{name}")


def _read(file: Path, stamp: str, n: int) -> dict[str, npt.NDArray[np.float32]] | None:
    """None where there is no file, a damaged one, or one of other pictures."""
    if not os.access(file, os.R_OK):
        return None
    try:
        with np.load(file, allow_pickle=False) as content:
            if str(content["stamp"]) != stamp:
                return None
            found = {name: content[name] for name in content.files if name in PARTS}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, MemoryError, *DAMAGED_ZIP):
        return None
    whole = all(x.dtype == np.float32 and len(x) == n and np.isfinite(x).all() for x in found.values())
    return found if found and whole else None
