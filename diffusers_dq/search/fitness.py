# SPDX-License-Identifier: Apache-2.0
"""How good a quantized pipeline is, as one number, lower is better. Any function of a pipeline will do."""

from collections.abc import Callable, Sequence

import numpy as np
import scipy.linalg
from diffusers import DiffusionPipeline

from diffusers_dq.denoise import Call
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
        return frechet_distance(self._features, self._features_of(pipe))

    def _features_of(self, pipe: DiffusionPipeline) -> np.ndarray:
        images = pictures(pipe, self._calls, num_inference_steps=self._steps, seed=self._seed)
        return np.concatenate([self._extractor(batch) for batch in images])


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), of features x [n, D] and y [m, D] (Heusel et al., 2017).

    The trace of the root is the sum of the singular values of A B^T where C_x = A^T A and C_y = B^T B, which needs no
    root of a matrix and cannot turn complex; A and B are at most [D, D]. Raises ValueError for fewer than two rows.
    """
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"a Frechet distance needs at least two pictures on both sides, got {len(x)} and {len(y)}")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    a, b = _root_of_covariance(x), _root_of_covariance(y)
    cross = scipy.linalg.svdvals(a @ b.T).sum()
    means = np.square(x.mean(0) - y.mean(0)).sum()
    return float(means + np.square(a).sum() + np.square(b).sum() - 2 * cross)


def _root_of_covariance(x: np.ndarray) -> np.ndarray:
    """A [min(n, D), D] with A^T A the covariance of x [n, D]."""
    return np.asarray(np.linalg.qr((x - x.mean(0)) / np.sqrt(len(x) - 1), mode="r"))
