# SPDX-License-Identifier: Apache-2.0
"""Speed and size against full precision and the peers: `diffusers-dq benchmark`.

A part (one GEMM shape, one model's denoising step, one pipeline) measures its contestants interleaved in one process
and becomes one group of a results file. A contestant that fails is in the file with its reason.
"""
