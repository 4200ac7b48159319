# SPDX-License-Identifier: Apache-2.0
"""QuaRot (Ashkboos et al., NeurIPS 2024): a rotation spreads outliers over all channels before they are rounded.

In language models the rotation is fused through the norms; here modulation stands between norm and linear, so the
quantize step makes it, for every linear (methods.md, B.7).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffusers_dq.methods.base import METHODS, Method, MethodOptions, Site, Solution, token_or_tensor
from diffusers_dq.scheme import QuantScheme
from diffusers_dq.transforms import NOT_ROTATED, Chain, Rotate


@dataclass(frozen=True, kw_only=True)
class QuaRotOptions(MethodOptions):
    """full_width: rotate all channels with one matrix, where an order fits (1152 = 36 x 32), not in blocks of up to
        256.
    seed: of the signs.   dynamic: activation scales a token at run time, else static ones a tensor, which need
        calibration. Their range is that of the 8 tokens a step that calibration keeps, not of all of them: extremes of
        channels say nothing of what is mixed from them.
    """

    full_width: bool = False
    seed: int = 0
    dynamic: bool = True


@METHODS.register("quarot")
class QuaRot(Method):
    Options: ClassVar[type[MethodOptions]] = QuaRotOptions
    summary = "a Hadamard rotation of every input, online, spreads its outliers; activations dynamic or static"
    options: QuaRotOptions

    @property
    def needs_statistics(self) -> bool:
        return not self.options.dynamic

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        return token_or_tensor(bits, self.options.dynamic)

    def solve(self, sites: Sequence[Site], timesteps: Tensor | None) -> Solution:
        chains, notes = {}, {}
        for site in sites:
            if site.transformable:
                rotation = Rotate.random(site.weights[0].shape[1], self.options.seed, self.options.full_width)
                if rotation is None:
                    notes[site.name] = NOT_ROTATED
                else:
                    chains[site.name] = Chain(rotation=rotation)
        return Solution(chains, notes)
