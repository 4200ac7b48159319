# SPDX-License-Identifier: Apache-2.0
"""Q-DiT (Chen et al., CVPR 2025): groups of input channels with scales of their own, in weights and activations.

The paper rounds weights by GPTQ: DQConfig(rounding="gptq"). Its search for a group size a layer is not here yet.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusers_dq.affine import RangeSearch
from diffusers_dq.methods.base import METHODS, Method, MethodOptions
from diffusers_dq.scheme import GROUP_MULTIPLE, QuantScheme


@dataclass(frozen=True, kw_only=True)
class QDiTOptions(MethodOptions):
    """group_size: input channels that share a scale, a multiple of 32. Where it does not divide a linear's width, the
        largest multiple of 32 below it that does; one scale a row where there is none.
    activations: "group", ranges of each group of each token (the paper), or "token", one a token, which is quicker
        and costs little (methods.md, A3).
    symmetric: of weights and groups of activations; the paper's are asymmetric. Weights of more than 4 bits are always
        symmetric: the kernels multiply weight - zero point as int8.
    search: of weight ranges; see HTG. "output" is not among them: it needs statistics.
    """

    group_size: int = 128
    activations: Literal["group", "token"] = "group"
    symmetric: bool = False
    search: RangeSearch = "minmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < GROUP_MULTIPLE or self.group_size % GROUP_MULTIPLE:
            raise ValueError(f"group_size must be a multiple of {GROUP_MULTIPLE}, got {self.group_size}")
        if self.search == "output":
            raise ValueError("search='output' weighs errors by statistics of the input, and this method has none")


@METHODS.register("qdit")
class QDiT(Method):
    """Its activation ranges are found at run time, so it needs no calibration."""

    Options: ClassVar[type[MethodOptions]] = QDiTOptions
    summary = "groups of input channels with ranges of their own, activations dynamic; without the search so far"
    options: QDiTOptions

    @property
    def needs_statistics(self) -> bool:
        return False

    def activation_scheme(self, bits: int, in_features: int) -> QuantScheme:
        size = fitting_group(in_features, self.options.group_size)
        if self.options.activations == "token" or size is None:
            return QuantScheme(bits=bits, granularity="token", dynamic=True)
        return QuantScheme(
            bits=bits, granularity="group", symmetric=self.options.symmetric, dynamic=True, group_size=size
        )

    def weight_scheme(self, bits: int, in_features: int) -> QuantScheme:
        size = fitting_group(in_features, self.options.group_size)
        if size is None:
            return QuantScheme(bits=bits, granularity="channel")
        symmetric = self.options.symmetric or bits > 4
        return QuantScheme(bits=bits, granularity="group", symmetric=symmetric, group_size=size)


def fitting_group(in_features: int, wanted: int) -> int | None:
    """The largest group size up to `wanted` that the kernels take for this width; None where there is none."""
    sizes = range(wanted - wanted % GROUP_MULTIPLE, 0, -GROUP_MULTIPLE)
    return next((size for size in sizes if in_features % size == 0), None)
