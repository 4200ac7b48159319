# SPDX-License-Identifier: Apache-2.0
"""The kernels of diffusers_dq: torch.library ops, each with a reference, a CPU form and a Triton form.

Importing this registers `torch.ops.diffusers_dq.*`. It needs torch; Triton is optional.
"""

from ._library import announce, backend
from ._tiles import use_tiles
from .attention import attention_int8
from .fused_quantize import gelu_quantize_dynamic, gelu_quantize_static, norm_quantize_dynamic, norm_quantize_static
from .grouped import linear_grouped
from .hadamard import check_order, hadamard_matrix, rotate, rotation_order
from .packing import pack_int4, pack_int6, unpack_int4, unpack_int6
from .quantize import quantize_dynamic, quantize_grouped, quantize_static
from .sdpa import dot_product_attention
from .w4a8 import linear_w4a8
from .w8a8 import linear_w8a8
from .weight_only import linear_w4a16, linear_w8a16

__all__ = [
    "announce",
    "attention_int8",
    "backend",
    "check_order",
    "dot_product_attention",
    "gelu_quantize_dynamic",
    "gelu_quantize_static",
    "hadamard_matrix",
    "linear_grouped",
    "linear_w4a8",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a16",
    "norm_quantize_dynamic",
    "norm_quantize_static",
    "pack_int4",
    "pack_int6",
    "quantize_dynamic",
    "quantize_grouped",
    "quantize_static",
    "rotate",
    "rotation_order",
    "unpack_int4",
    "unpack_int6",
    "use_tiles",
]
