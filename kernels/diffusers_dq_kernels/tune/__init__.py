# SPDX-License-Identifier: Apache-2.0
"""The tuner of tiles: `python -m diffusers_dq_kernels.tune --help` says what it does and takes."""

from ._candidates import candidates
from ._command import main
from ._problems import MODELS, PROBLEMS

__all__ = ["MODELS", "PROBLEMS", "candidates", "main"]
