# SPDX-License-Identifier: Apache-2.0
"""How good a quantized pipeline is, as one number, lower is better. Any function of a pipeline will do."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffusers_dq.denoise import Call
from diffusers_dq.frechet import frechet_distance
from diffusers_dq.search.running import final_latents, pictures

Fitness = Callable[[DiffusionPipeline], float]
Extractor = Callable[[np.ndarray], np.ndarray]


class TrajectoryError:
    """Mean squared difference of final latents to those of full precision, from the same seeds.

    Paired with the very run it should repeat, it needs few calls where a distance of distributions needs thousands.
    reference: the pipeline in full precision, run once, at construction.   calls, num_inference_steps, seed: as
    `dq.compare` takes them.   Memory: the final latents of all calls.
    """

    def __init__(
        self, reference: DiffusionPipeline, calls: Sequence[Call], *, num_inference_steps: int, seed: int = 0
    ) -> None:
        self._calls, self._steps, self._seed = list(calls), num_inference_steps, seed
        self._latents = final_latents(reference, calls, num_inference_steps=num_inference_steps, seed=seed)

    def __call__(self, pipe: DiffusionPipeline) -> float:
        found = final_latents(pipe, self._calls, num_inference_steps=self._steps, seed=self._seed)
        errors = [(y.double() - x.double()).square().mean() for x, y in zip(self._latents, found, strict=True)]
        return float(sum(errors)) / len(errors)


class FeatureFID:
    """Frechet distance between features of the pipeline's pictures and of a reference's: Q-DiT's fitness.

    extractor: pictures [B, H, W, C] (or videos) in [0, 1] -> features [B, D]; with Inception's it is FID.
    calls: all pictures of a candidate. The paper takes 800; with fewer than D the distance is of low rank and noisy.
    reference: pictures [B, H, W, C], or the pipeline in full precision that makes them from the same calls.
    """

    def __init__(
        self,
        extractor: Extractor,
        reference: DiffusionPipeline | np.ndarray,
        calls: Sequence[Call],
        *,
        num_inference_steps: int,
        seed: int = 0,
    ) -> None:
        self._extractor, self._calls = extractor, list(calls)
        self._steps, self._seed = num_inference_steps, seed
        self._features = (
            self._features_of(reference) if isinstance(reference, DiffusionPipeline) else extractor(reference)
        )

    def __call__(self, pipe: DiffusionPipeline) -> float:
        x, y = (torch.from_numpy(part.astype("float64")) for part in (self._features, self._features_of(pipe)))
        return frechet_distance(x, y)

    def _features_of(self, pipe: DiffusionPipeline) -> np.ndarray:
        images = pictures(pipe, self._calls, num_inference_steps=self._steps, seed=self._seed)
        return np.concatenate([self._extractor(batch) for batch in images])
