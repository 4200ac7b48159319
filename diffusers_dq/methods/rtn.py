# SPDX-License-Identifier: Apache-2.0
"""Round to nearest: min-max ranges and nothing else. The floor that every method has to beat."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusers_dq.methods.base import METHODS, Method, MethodOptions
from diffusers_dq.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True)
class RTNOptions(MethodOptions):
    """dynamic: activation scales found at run time; no calibration is needed then.
    granularity: "token" or "tensor", what shares an activation scale; None is "token" if dynamic, else "tensor".
    """

    dynamic: bool = True
    granularity: Literal["token", "tensor"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity == "token" and not self.dynamic:
            raise ValueError("granularity='token' needs dynamic=True: a static scale cannot know the tokens to come")


@METHODS.register("rtn")
class RTN(Method):
    Options: ClassVar[type[MethodOptions]] = RTNOptions
    summary = "round to nearest with min-max ranges; activations dynamic (no calibration) or static"
    options: RTNOptions

    @property
    def needs_statistics(self) -> bool:
        return not self.options.dynamic

    def activation_scheme(self, bits: int, in_features: int, group_size: int) -> QuantScheme:
        dynamic = self.options.dynamic
        granularity = self.options.granularity or ("token" if dynamic else "tensor")
        return QuantScheme(bits=bits, granularity=granularity, symmetric=dynamic, dynamic=dynamic)
