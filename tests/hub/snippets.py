# SPDX-License-Identifier: Apache-2.0
"""Snippets of Python that users run."""

PUSH = """
pipe = DiTPipeline.from_pretrained(htg)
result = str(dq.push_to_hub(pipe, repo))
"""
PICTURES = """
import hashlib
def digest(pipe):
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=3, guidance_scale=1.5, output_type="np")
    images = pipe([1, 2], generator=torch.manual_seed(0), **call).images
    return hashlib.sha256(images.tobytes()).hexdigest()
"""
LOAD = PICTURES + "result = digest(DiTPipeline.from_pretrained(repo))"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
