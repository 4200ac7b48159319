# SPDX-License-Identifier: Apache-2.0
"""How a weight is rounded once a method has transformed it: parts that go with any method."""

from dataclasses import dataclass
from typing import Literal

from diffusers_dq.affine import RangeSearch
from diffusers_dq.checks import check_fields
from diffusers_dq.scheme import check_group_size

Rounding = Literal["nearest", "gptq", "adaround"]


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How rounding="adaround" learns, one unit of the model after the other, as in BRECQ and Q-Diffusion.

    unit: "block", a member of the model's outermost module lists, whose output is to stay; or "layer", each linear.
    iterations: for a unit, each on the batch of one kept sample. (Q-Diffusion and PTQ4DiT's code: 20,000 on 32.)
    learning_rate: of V.   input_learning_rate: of a static input scale's logarithm, falling to 0 as a cosine. (Their
        code: 4e-5 over 20,000 iterations, which is as long a way.)
    rounding_weight: of the term that presses V to a decision, in [0, 1] as the mean over all weights, against the
        unit's error in multiples of what rounding to nearest leaves. (The code of both weighs sums that depend on a
        model's scale and width, by 0.01.)   warmup: share of the iterations before it sets in.
    beta: of that term, first and last.
    """

    unit: Literal["block", "layer"] = "block"
    iterations: int = 1000
    learning_rate: float = 1e-2
    input_learning_rate: float = 8e-4
    rounding_weight: float = 10.0
    warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.iterations < 1 or not 0 <= self.warmup < 1:
            raise ValueError(
                "reconstruction needs at least 1 iteration and a warmup in [0, 1), got"
                f" {self.iterations} and {self.warmup}"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method has one of its own; `DQConfig` changes parts of it.

    group_size: input channels of a weight's row that share a scale, a multiple of 32; 0 is one scale a row. Where it
        does not divide a linear's width, the largest multiple of 32 below it that does, else one scale a row.
    rounding: "nearest"; "gptq", by second moments of the inputs: those of all tokens and steps if calibration summed
        them (second_moments=True), else found block by block from the samples it kept. It weighs errors by the inputs
        itself, so search="output" then takes weight ranges by min and max; or "adaround", learned on the samples, the
        better the more there are.
    search: of ranges, of weights and static ones of activations. "minmax" covers everything; "mse" has the least L2.4
        error of 80 shrunken ones (Q-Diffusion); "percentile" the least squared error of those that leave out 0.1,
        0.01 or 0.001 percent at either end (RepQ-ViT); "output" is "mse" in which an error in a weight's column counts
        by the size of the inputs it meets.
    low_rank: rank of a part of the weight that is kept in the model's own precision and multiplied by the unrounded
        input (SVDQuant, Li et al., ICLR 2025); what is left of the weight is rounded. 0 is none, and a linear whose
        branch would be larger than its weight has none.
    output_correction: make up for the systematic part of the error that rounding leaves in an output: for its mean in
        each timestep group by the bias, for its share of the output itself by the weight scales. Free at run time.
    noise_correction: take out of the model's prediction what rounding adds to it, as fitted by step on the samples
        that calibration keeps (PTQD; noise_correction.py).
    """

    group_size: int = 0
    rounding: Rounding = "nearest"
    search: RangeSearch = "minmax"
    low_rank: int = 0
    output_correction: bool = False
    noise_correction: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.group_size:
            check_group_size(self.group_size)
        if self.low_rank < 0:
            raise ValueError(f"low_rank must be at least 0, got {self.low_rank}")

    @property
    def needs_statistics(self) -> bool:
        corrects = self.output_correction or self.noise_correction
        return self.rounding != "nearest" or corrects or self.search == "output"
