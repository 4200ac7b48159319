# SPDX-License-Identifier: Apache-2.0
"""A quantization method of your own, registered from outside the package: python examples/custom_method.py

This one divides each input channel by the root mean square of its tokens, so that all channels come out equally large,
and leaves rounding, folding, kernels and files to the library.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiTPipeline
from torch import Tensor

import diffusers_dq as dq
from diffusers_dq.methods import METHODS, Method, MethodOptions, Site, Solution
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.transforms import Chain, Scale

MODEL = Path(__file__).parent / "dit-cifar10"


@dataclass(frozen=True, kw_only=True)
class EqualizeOptions(MethodOptions):
    """strength: 0 leaves channels as they are, 1 makes them equally large."""

    strength: float = 0.5


@METHODS.register("equalize")
class Equalize(Method):
    Options = EqualizeOptions
    summary = "channels brought towards one size, activations rounded a token"
    options: EqualizeOptions

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return QuantScheme(bits=bits, granularity="token", dynamic=True)

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        return Solution({site.name: self._chain(site) for site in sites if site.transformable})

    def _chain(self, site: Site) -> Chain:
        size = site.tokens().square().mean((0, 1)).sqrt().clamp(min=1e-6)  # [K]
        return Chain((Scale((size / size.mean()) ** self.options.strength),))


if __name__ == "__main__":
    reference, pipe = DiTPipeline.from_pretrained(MODEL), DiTPipeline.from_pretrained(MODEL)
    calls = [dict(class_labels=[1, 3, 5, 7], guidance_scale=1.5)]
    statistics = dq.calibrate(pipe, calls, num_inference_steps=10, seed=100)
    dq.quantize(pipe, dq.DQConfig("equalize", weight_bits=4, strength=0.5), statistics=statistics)
    comparison = dq.compare(reference, pipe, calls, num_inference_steps=10, layers=False)
    print(f"equalize, W4A8: PSNR {comparison.mean_psnr:.1f} dB")
