# SPDX-License-Identifier: Apache-2.0
"""What of diffusers' own tests cannot pass, and why. Each is a strict xfail: when it passes, it has to go."""

from typing import NamedTuple


class Limit(NamedTuple):
    """architecture, configuration: "*" is any.   raises: what the test fails with; anything else is a failure."""

    architecture: str
    check: str
    config: str
    raises: type[Exception]
    reason: str


LIMITS = (
    Limit(
        "*",
        "quantization_num_parameters",
        "w4a8",
        AssertionError,
        "num_parameters counts stored values, and a byte holds two of 4 bits",
    ),
    Limit(
        "*",
        "quantization_training",
        "*",
        RuntimeError,
        "quantized layers are for inference: backward is an error, not a wrong number",
    ),
    Limit(
        "*",
        "quantized_layers",
        "*",
        AssertionError,
        "it wants every linear rounded; those that a spec does not name, embedders and first and last layers, are not",
    ),
    Limit(
        "PixArt",
        "quantization_memory_footprint",
        "*",
        AssertionError,
        "its model is 4 channels wide: scales take what the integers save",
    ),
    Limit(
        "DiT",
        "torch_compile_with_group_offload",
        "*",
        ValueError,
        "diffusers rules group offloading out for its DiT class",
    ),
)


def limit(architecture: str, check: str, config: str) -> Limit | None:
    """Why this check must fail here; None where it must pass."""
    for known in LIMITS:
        if check == known.check and known.architecture in ("*", architecture) and known.config in ("*", config):
            return known
    return None
