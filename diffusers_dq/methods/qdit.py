# SPDX-License-Identifier: Apache-2.0
"""Q-DiT (Chen et al., CVPR 2025): groups of input channels with scales of their own, in weights and activations.

The paper rounds weights by GPTQ, rounding="gptq", and searches for a group size a layer: diffusers_dq/search.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusers_dq.methods.base import METHODS, Method, MethodOptions
from diffusers_dq.recipe import Recipe
from diffusers_dq.scheme import QuantScheme, fitting_group


@dataclass(frozen=True, kw_only=True)
class QDiTOptions(MethodOptions):
    """activations: "group", ranges of each group of each token (the paper), or "token", one a token, which is quicker
        and costs little (methods.md, A3).
    symmetric: of weights and groups of activations; the paper's are asymmetric. Weights of more than 4 bits are always
        symmetric: the kernels multiply weight - zero point as int8.
    """

    activations: Literal["group", "token"] = "group"
    symmetric: bool = False


@METHODS.register("qdit")
class QDiT(Method):
    """Its activation ranges are found at run time, so it needs no calibration."""

    Options: ClassVar[type[MethodOptions]] = QDiTOptions
    summary = "groups of input channels with ranges of their own, activations dynamic; group sizes can be searched"
    recipe = Recipe(group_size=128)
    options: QDiTOptions

    @property
    def needs_statistics(self) -> bool:
        return False

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        size = fitting_group(in_features, group_size)
        if self.options.activations == "token" or size is None:
            return QuantScheme(bits=bits, granularity="token", dynamic=True)
        return QuantScheme(
            bits=bits, granularity="group", symmetric=self.options.symmetric, dynamic=True, group_size=size
        )

    def weight_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        size = fitting_group(in_features, group_size)
        if size is None or not self.options.symmetric:
            return super().weight_scheme(bits, in_features, group_size)
        return QuantScheme(bits=bits, granularity="group", group_size=size)
