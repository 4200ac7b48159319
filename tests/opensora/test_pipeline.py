# SPDX-License-Identifier: Apache-2.0
"""The samplers against their equations, and what a diffusers pipeline has to do besides."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from transformers import T5Config, T5EncoderModel

from diffusers_dq.opensora import OpenSoraPipeline, clean_caption, rectified_flow_scheduler
from diffusers_dq.opensora.pipeline12 import OpenSora12Pipeline, timestep_ratio

# schedulers work in fp32, the equations below in fp64; an output of up to 8 steps under guidance 7 loses some digits
TOLERANCE = 1e-4


def seeded():
    return torch.Generator().manual_seed(0)


def close(latents, expected):
    return (latents - expected).abs().max() <= TOLERANCE * expected.abs().max()


def both(model, z, t, call, **conditions):
    """Outputs with the prompts and with the empty captions, the mask of the prompts in both."""
    empty = model.caption_projection.y_embedding.expand_as(call["prompt_embeds"])
    return (
        model(z.float(), torch.full((2,), t), y, call["prompt_attention_mask"], **conditions).sample.double()
        for y in (call["prompt_embeds"], empty)
    )


@torch.no_grad()
@pytest.mark.parametrize("channels", [3, None])
def test_open_sora_samples_as_iddpm(pipe_v1, call_v1, channels):
    """Ancestral sampling over a respaced chain, log variance between its bounds, guidance on the first channels."""
    steps, scale = 5, 7.0
    call = dict(call_v1, guidance_channels=channels, output_type="latent")
    latents = pipe_v1(**call, num_inference_steps=steps, guidance_scale=scale, generator=seeded()).frames

    product = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    chosen = np.round(np.linspace(0, 999, steps)).astype(int)
    generator, shape, n = seeded(), (2, 4, 3, 8, 8), channels or 4
    z = torch.randn(shape, generator=generator).double()
    for i in reversed(range(steps)):
        now, before = product[chosen[i]], product[chosen[i - 1]] if i else 1.0
        beta = 1 - now / before
        prompted, empty = both(pipe_v1.transformer, z, int(chosen[i]), call_v1)
        noise = prompted[:, :4].clone()
        noise[:, :n] = empty[:, :n] + scale * (prompted[:, :n] - empty[:, :n])
        clean = (z - math.sqrt(1 - now) * noise) / math.sqrt(now)
        z = (math.sqrt(before) * beta * clean + math.sqrt(now / before) * (1 - before) * z) / (1 - now)
        if i:
            low, high = math.log(beta * (1 - before) / (1 - now)), math.log(beta)
            share = (prompted[:, 4:] + 1) / 2
            spread = torch.exp((share * high + (1 - share) * low) / 2)
            z = z + spread * torch.randn(shape, generator=generator).double()
    assert close(latents, z)


@torch.no_grad()
@pytest.mark.parametrize("transform", [True, False])
def test_open_sora_12_follows_the_rectified_flow(pipe_v3, call_v3, transform):
    steps, scale = 6, 7.0
    settings = dict(timestep_transform=transform, num_inference_steps=steps, guidance_scale=scale)
    latents = pipe_v3(**call_v3, **settings, generator=seeded()).frames

    ratio = math.sqrt(32 * 48 / 512**2) * math.sqrt(5) if transform else 1.0
    times = [1 - i / steps for i in range(steps)] + [0.0]
    times = [ratio * t / (1 + (ratio - 1) * t) for t in times]
    z = torch.randn(2, 4, 5, 4, 6, generator=seeded()).double()
    for t, following in zip(times, times[1:], strict=False):
        given, empty = (
            out[:, :4] for out in both(pipe_v3.transformer, z, 1000 * t, call_v3, fps=24.0, height=32, width=48)
        )
        z = z + (t - following) * (empty + scale * (given - empty))
    assert close(latents, z)
    assert torch.allclose(pipe_v3.scheduler.timesteps, 1000 * torch.tensor(times[:-1]))


def test_the_ratio_of_a_square_picture_is_one():
    assert timestep_ratio(512, 512, 1) == 1 and timestep_ratio(1024, 1024, 16) == 8


def test_frames_are_decoded_one_by_one(pipe_v1, call_v1):
    settings = dict(num_inference_steps=2)
    latents = pipe_v1(**call_v1, **settings, output_type="latent", generator=seeded()).frames
    video = pipe_v1(**call_v1, **settings, output_type="pt", generator=seeded()).frames
    assert video.shape == (2, 3, 3, 8, 8)
    with torch.no_grad():
        picture = pipe_v1.vae.decode(latents[1:, :, 2] / pipe_v1.vae.config.scaling_factor).sample
    assert torch.allclose(video[1, 2], (picture[0] / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert pipe_v1(**call_v1, **settings, generator=seeded()).frames.shape == (2, 3, 8, 8, 3)
    pictures = pipe_v1(**call_v1, **settings, output_type="pil", generator=seeded(), return_dict=False)[0]
    assert [len(frames) for frames in pictures] == [3, 3] and pictures[0][0].size == (8, 8)


def test_a_callback_sees_every_step_and_may_change_latents(pipe_v3, call_v3):
    seen = []

    def zero(pipe, step, timestep, tensors):
        seen.append((step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipe_v3(**call_v3, num_inference_steps=3, callback_on_step_end=zero).frames
    assert not latents.any() and seen == list(enumerate(pipe_v3.scheduler.timesteps.tolist()))
    assert pipe_v3.num_timesteps == 3


def test_guidance_of_one_runs_the_prompts_alone(pipe_v1, pipe_v3, call_v1, call_v3):
    for pipe, call in ((pipe_v1, call_v1), (pipe_v3, call_v3)):
        batches = []
        hook = lambda module, args, batches=batches: batches.append(len(args[0]))  # noqa: E731
        pipe.transformer.register_forward_pre_hook(hook)
        settings = dict(num_inference_steps=1, num_videos_per_prompt=2)
        assert pipe(**call, **settings, guidance_scale=1.0).frames.shape[0] == 4
        pipe(**call, **settings, guidance_scale=2.0)
        assert batches == [4, 8]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_get_the_noise_alone(pipe_v1, call_v1, scheduler):
    pipe_v1.scheduler = scheduler.from_config(pipe_v1.scheduler.config, variance_type=None)
    latents = pipe_v1(**call_v1, num_inference_steps=3, output_type="latent").frames
    assert latents.shape == (2, 4, 3, 8, 8) and latents.isfinite().all()


def test_latents_of_the_user_are_the_start(pipe_v3, call_v3):
    noise = torch.randn(2, 4, 5, 4, 6, generator=seeded())
    drawn = pipe_v3(**call_v3, num_inference_steps=2, generator=seeded()).frames
    assert torch.equal(pipe_v3(**call_v3, num_inference_steps=2, latents=noise).frames, drawn)


class _Letters:
    """A tokenizer: a letter a token, zeros behind."""

    def __init__(self):
        self.texts = []

    def __call__(self, texts, max_length, **settings):
        assert settings["padding"] == "max_length" and settings["truncation"]
        self.texts += texts
        rows = [[ord(letter) % 50 + 1 for letter in text[:max_length]] for text in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=(ids > 0).long())


@torch.no_grad()
@pytest.mark.parametrize("pipeline", [OpenSoraPipeline, OpenSora12Pipeline])
def test_prompts_are_cleaned_and_encoded(pipeline, pipe_v1, pipe_v3, call_v1, call_v3):
    torch.manual_seed(0)
    encoder = T5EncoderModel(T5Config(vocab_size=51, d_model=24, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    tokenizer = _Letters()
    pipe, call = (pipe_v1, call_v1) if pipeline is OpenSoraPipeline else (pipe_v3, call_v3)
    pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder)
    embeds, mask = pipe.encode_prompt(["ant", "A <b>long</b>  caption"])
    assert tokenizer.texts == ["ant", "a long caption"] and mask.sum(1).tolist() == [3, 6]
    call = {**call, "num_inference_steps": 1, "output_type": "latent"}
    call |= {"prompt_embeds": embeds[:1], "prompt_attention_mask": mask[:1]}
    expected = pipe(**call, generator=seeded()).frames
    call |= {"prompt_embeds": None, "prompt_attention_mask": None}
    if pipeline is OpenSora12Pipeline:
        pipe(**call, prompt="Ant", generator=seeded())
        pipe(**call, prompt="Ant aesthetic score: 5.0.", generator=seeded())
        assert tokenizer.texts[2:] == ["ant aesthetic score: 6.5.", "ant aesthetic score: 5.0."]
        call["aesthetic_score"] = None
    assert torch.equal(pipe(**call, prompt=" Ant", generator=seeded()).frames, expected)


def test_captions_are_cleaned():
    text = "  A <b>Red</b> fox &amp; a\n\tdog, see https://a.b/c?d or www.e.org &lt;i&gt;x "
    assert clean_caption(text) == "a red fox & a dog, see or x"
    assert clean_caption(clean_caption(text)) == clean_caption(text)
    assert clean_caption("1 < 2, 3 > 2") == "1 < 2, 3 > 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "a fox"}, "either prompt or prompt_embeds"),
        ({"prompt_embeds": None, "prompt": "a fox"}, "no tokenizer and text encoder"),
        ({"prompt_embeds": torch.zeros(2, 7, 24)}, r"up to 6, 24\], got \[2, 7, 24\]"),
        ({"prompt_attention_mask": torch.zeros(2, 6)}, r"a token that counts in each row"),
        ({"prompt_attention_mask": torch.ones(2, 5)}, r"shape \[2, 6\]"),
        ({"height": 30}, "multiples of 8, got 30 and 48"),
        ({"num_frames": 16}, "multiple of 17 without a VAE, got 16"),
        ({"output_type": "np"}, "no VAE to make 'np'"),
        ({"output_type": "gif"}, "one of np, pt, pil, latent"),
        ({"latents": torch.zeros(1, 4, 5, 4, 6)}, r"latents must have shape \[2, 4, 5, 4, 6\]"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "'latents' only, got prompt_embeds"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said(pipe_v3, call_v3, change, message):
    with pytest.raises(ValueError, match=message):
        pipe_v3(**{**call_v3, **change}, num_inference_steps=1)


def test_a_vae_that_decodes_videos_is_refused(pipe_v3):
    from diffusers import AutoencoderKLCogVideoX

    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1)
    with pytest.raises(ValueError, match="frame by frame; got AutoencoderKLCogVideoX"):
        OpenSora12Pipeline(None, None, vae, pipe_v3.transformer, rectified_flow_scheduler())


def test_channels_that_are_not_there_are_refused(pipe_v1, call_v1):
    with pytest.raises(ValueError, match="guidance_channels must be 1 to 4 or None, got 5"):
        pipe_v1(**call_v1, guidance_channels=5)


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_a_scheduler_that_shifts_by_mu_is_told_not_to(pipe_v3, call_v3, kind):
    expected = pipe_v3(**call_v3, num_inference_steps=3, generator=seeded()).frames
    settings = dict(use_dynamic_shifting=True, time_shift_type=kind)
    pipe_v3.scheduler = type(pipe_v3.scheduler).from_config(pipe_v3.scheduler.config, **settings)
    assert close(pipe_v3(**call_v3, num_inference_steps=3, generator=seeded()).frames, expected)
