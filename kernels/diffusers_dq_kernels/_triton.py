# SPDX-License-Identifier: Apache-2.0
"""The one guarded import of Triton: without it the package still imports and CUDA tensors take the references."""

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl

    MISSING: str | None = None
except ImportError as error:
    MISSING = f"triton cannot be imported ({error})"

    class triton:  # type: ignore[no-redef]
        """Stands in for the module while kernels are defined; nothing of it is ever called."""

        @staticmethod
        def jit(kernel: Any, **options: Any) -> Any:
            return kernel

    class tl:  # type: ignore[no-redef]
        """Stands in for the language while kernels are defined: only annotations look at it."""

        constexpr = Any


__all__ = ["MISSING", "jit", "tl", "triton"]


def jit(*fixed: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`; `fixed` names the integers whose value must not cause another compilation (M changes freely)."""
    return lambda kernel: triton.jit(kernel, do_not_specialize=list(fixed))
