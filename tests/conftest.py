# SPDX-License-Identifier: Apache-2.0
"""Triton kernels run in the interpreter where there is no GPU: the variable must be set before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(min(2, os.cpu_count() or 1))
