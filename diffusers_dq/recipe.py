# SPDX-License-Identifier: Apache-2.0
"""How a weight is rounded once a method has transformed it: parts that go with any method."""

from dataclasses import dataclass
from typing import Literal

from diffusers_dq.affine import RangeSearch
from diffusers_dq.checks import check_fields
from diffusers_dq.scheme import check_group_size

Rounding = Literal["nearest", "gptq"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method has one of its own; `DQConfig` changes parts of it.

    group_size: input channels of a weight's row that share a scale, a multiple of 32; 0 is one scale a row. Where it
        does not divide a linear's width, the largest multiple of 32 below it that does, else one scale a row.
    rounding: "nearest", or "gptq", for which calibration needs second_moments=True. It weighs errors by the inputs
        itself: search="output" then takes weight ranges by min and max.
    search: of ranges, of weights and static ones of activations. "minmax" covers everything; "mse" has the least L2.4
        error of 80 shrunken ones (Q-Diffusion); "percentile" the least squared error of those that leave out 0.1,
        0.01 or 0.001 percent at either end (RepQ-ViT); "output" is "mse" in which an error in a weight's column counts
        by the size of the inputs it meets.
    output_correction: make up for the systematic part of the error that rounding leaves in an output: for its mean in
        each timestep group by the bias, for its share of the output itself by the weight scales. Free at run time.
    """

    group_size: int = 0
    rounding: Rounding = "nearest"
    search: RangeSearch = "minmax"
    output_correction: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.group_size:
            check_group_size(self.group_size)

    @property
    def needs_statistics(self) -> bool:
        return self.rounding != "nearest" or self.output_correction or self.search == "output"
