# SPDX-License-Identifier: Apache-2.0
"""Settings by name: our own, by what they are for, and those of the papers, by their method.

Ours were chosen by measurement on the trained demo model, plain and with outliers, at W8A8, W6A8 and W4A8: README.
"""

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["quality", "balanced", "speed", "paper"]

OURS: Mapping[str, Mapping[str, Any]] = {
    # three quarters of a bit a weight more, spent on groups of channels and bits where they help most
    "quality": {"method": "auto", "extra_bits": 0.75, "rounding": "gptq", "output_correction": True},
    # one scale a row: the quicker products
    "balanced": {
        "method": "composed",
        "shift": False,
        "rounding": "gptq",
        "output_correction": True,
        "search": "mse",
    },
    # static: nothing is found out about an activation at run time, and nothing is done to it but rounding
    "speed": {
        "method": "composed",
        "rotate": False,
        "dynamic": False,
        "online": False,
        "rounding": "gptq",
        "output_correction": True,
        "search": "mse",
    },
}

# What a paper describes where it differs from its method's defaults here; bits are the user's.
PAPERS: Mapping[str, Mapping[str, Any]] = {
    "htg": {
        "linkage": "ward",
        "scope": "layer",
        "ema_steps": None,
        "search": "mse",
        "output_correction": False,
        "quantize_attention": True,
    },
    "ptq4dit": {"rounding": "adaround"},
    "qdit": {"rounding": "gptq"},
    "viditq": {"window": "first", "full_width": True},
    "smoothquant": {"dynamic": True},
    "quarot": {"rounding": "gptq", "full_width": True},
    "rtn": {},
    "awq": {},
    "qdiffusion": {},
    "ptq4dm": {},
    "ptqd": {},
    "repq": {},
    "tfmq": {},
    "g4w_p4a": {},
    "svdquant": {},
}


def settings_of(preset: str, method: str | None) -> dict[str, Any]:
    """Arguments of DQConfig, `method` among them. Raises ValueError for a preset and a method that do not match."""
    if preset != "paper":
        if method is not None and method != OURS[preset]["method"]:
            raise ValueError(f"preset={preset!r} is a setting of {OURS[preset]['method']!r}, not of {method!r}")
        return dict(OURS[preset])
    if method is None or method not in PAPERS:
        raise ValueError(f"preset='paper' needs a method with a paper: one of {', '.join(PAPERS)}; got {method!r}")
    return {"method": method, **PAPERS[method]}
