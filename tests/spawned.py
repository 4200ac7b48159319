# SPDX-License-Identifier: Apache-2.0
"""What a process of multiprocessing runs: `spawn` imports it by name, and imports nothing else of the tests."""

from pathlib import Path


def generate(folder: str, path: str | Path, steps: int, seed: int) -> None:
    """Load a DiT pipeline, run it, write the images [2, height, width, 3] to a file, as "images"."""
    import torch
    from diffusers import DiTPipeline
    from safetensors.torch import save_file

    import diffusers_dq  # noqa: F401, registers

    torch.set_num_threads(1)
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    images = pipe([1, 2], generator=generator, num_inference_steps=steps, output_type="np", guidance_scale=1.0).images
    save_file({"images": torch.from_numpy(images)}, path)
