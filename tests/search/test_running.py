# SPDX-License-Identifier: Apache-2.0
import copy

import numpy as np
import pytest
import torch
from support import CALLS, PIXART_CALL, tiny_pipeline, tiny_pixart_pipeline

from diffusers_dq.denoise import run_call
from diffusers_dq.search.fitness import FeatureFID, TrajectoryError
from diffusers_dq.search.running import final_latents, tokens_of, with_transformer


def test_final_latents_are_those_a_pipeline_returns():
    pipe = tiny_pixart_pipeline()
    found = final_latents(pipe, [PIXART_CALL], num_inference_steps=3, seed=5)[0]
    expected = run_call(pipe, PIXART_CALL, num_inference_steps=3, seed=5, output_type="latent")
    assert torch.equal(found, expected)


def test_a_pipeline_that_always_decodes_is_stopped_before_it_does(monkeypatch):
    pipe = tiny_pipeline()
    decoded = run_call(pipe, CALLS[0], num_inference_steps=3, seed=5, output_type="np")
    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda *args: pytest.fail("decoded"))
        latents = final_latents(pipe, CALLS[:1], num_inference_steps=3, seed=5)[0]
    pictures = pipe.vae.decode(latents[:2] / pipe.vae.config.scaling_factor).sample  # the second half is unconditional
    assert np.allclose(decoded, (pictures / 2 + 0.5).clamp(0, 1).detach().permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert "step" not in vars(pipe.scheduler)


def test_a_pipeline_without_scheduler_steps_is_refused(monkeypatch):
    pipe = tiny_pipeline()
    monkeypatch.setattr(type(pipe), "__call__", lambda self, class_labels, **rest: ("picture",))
    with pytest.raises(ValueError, match="did not call its scheduler's step"):
        final_latents(pipe, [dict(class_labels=[1])], num_inference_steps=3, seed=0)


def test_a_private_pipeline_leaves_the_given_one_as_it_is():
    pipe = tiny_pipeline()
    pipe.scheduler.set_timesteps(7)
    components, config = pipe.components, dict(pipe.config)
    private = with_transformer(pipe, copy.deepcopy(pipe.transformer))
    final_latents(private, CALLS[:1], num_inference_steps=3, seed=0)
    assert pipe.components == components and dict(pipe.config) == config
    assert private.vae is pipe.vae and private.transformer is not pipe.transformer
    assert len(pipe.scheduler.timesteps) == 7


def test_tokens_are_those_a_linear_reads_in_a_forward():
    pipe = tiny_pixart_pipeline()
    names = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_k"]
    assert tokens_of(pipe, names, [PIXART_CALL], seed=0) == {names[0]: 2 * 64, names[1]: 2 * 5}


def test_trajectory_error_is_zero_for_the_reference_and_the_mean_over_calls_else():
    pipe = tiny_pipeline()
    fitness = TrajectoryError(pipe, CALLS, num_inference_steps=3, seed=1)
    assert fitness(pipe) == 0
    other = tiny_pipeline(seed=1)
    alone = [TrajectoryError(pipe, [c], num_inference_steps=3, seed=1 + i)(other) for i, c in enumerate(CALLS)]
    assert fitness(other) == pytest.approx(sum(alone) / 2) and alone[0] != alone[1]


def test_feature_fid_takes_any_extractor_and_a_pipeline_or_pictures_as_reference():
    pipe, other = tiny_pipeline(), tiny_pipeline(seed=1)
    calls = [dict(class_labels=[i, i + 1], guidance_scale=1.5) for i in range(2)]

    def extractor(pictures):
        return pictures.mean(axis=(1, 2))

    fitness = FeatureFID(extractor, pipe, calls, num_inference_steps=2)
    assert fitness(pipe) == pytest.approx(0, abs=1e-9) and fitness(other) > 1e-6
    pictures = np.random.default_rng(0).random((8, 8, 8, 3))
    assert FeatureFID(extractor, pictures, calls, num_inference_steps=2)(pipe) > 1e-6
