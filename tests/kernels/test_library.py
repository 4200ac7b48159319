# SPDX-License-Identifier: Apache-2.0
import ast
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffusers_dq_kernels
from diffusers_dq_kernels import _library, announce, backend

PACKAGE = Path(diffusers_dq_kernels.__file__).parent
OPS = (
    "attention_int8",
    "gelu_quantize_dynamic",
    "gelu_quantize_static",
    "linear_grouped",
    "linear_w4a16",
    "linear_w4a8",
    "linear_w8a16",
    "linear_w8a8",
    "norm_quantize_dynamic",
    "norm_quantize_static",
    "quantize_dynamic",
    "quantize_grouped",
    "quantize_static",
)


def run_python(code: str, **environment: str) -> str:
    env = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_public_names() -> None:
    public = set(diffusers_dq_kernels.__all__)
    others = {
        "announce",
        "backend",
        "check_order",
        "dot_product_attention",
        "hadamard_matrix",
        "rotate",
        "rotation_order",
        "pack_int4",
        "pack_int6",
        "unpack_int4",
        "unpack_int6",
        "use_tiles",
    }
    assert public == {*OPS, *others}
    assert all(getattr(diffusers_dq_kernels, name) for name in public)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_every_form_and_a_docstring(op: str) -> None:
    for key in ("CPU", "CUDA", "CompositeExplicitAutograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"diffusers_dq::{op}", key)
    assert (
        "Returns" in diffusers_dq_kernels.__dict__[op].__doc__
        or "as there" in diffusers_dq_kernels.__dict__[op].__doc__
    )
    assert backend(op, "cpu")[0] == "cpu"
    assert backend(op, "cuda") == ("triton", None)
    name, reason = backend(op, "mps")
    assert name == "reference" and reason is not None and "mps" in reason


def test_unknown_op_names_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"no op 'linear_w2a2'; known: \['.*'linear_w4a16'"):
        backend("linear_w2a2", "cpu")


def test_announce_warns_once_for_each_reason(caplog: pytest.LogCaptureFixture) -> None:
    _library.announce.cache_clear()
    with caplog.at_level(logging.WARNING, "diffusers_dq_kernels"):
        for _ in range(3):
            announce("linear_w8a8", "some reason")
        announce("linear_w8a8", "another reason")
    assert caplog.messages == ["linear_w8a8: some reason", "linear_w8a8: another reason"]


def test_imports_without_triton() -> None:
    output = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, diffusers_dq_kernels as k\n"
        "print(k.backend('linear_w8a8', 'cuda'))\n"
        "print(k.quantize_dynamic(torch.ones(1, 4), torch.tensor([0]), None, None, 8)[0].tolist())"
    )
    assert "('reference', 'triton cannot be imported" in output
    assert "[[127, 127, 127, 127]]" in output


def test_a_cpu_without_vnni_is_announced_and_exact() -> None:
    output = run_python(
        "import torch, diffusers_dq_kernels as k\n"
        "x = torch.full((4, 1500), 127, dtype=torch.int8)\n"
        "args = (x, x, torch.ones(4), torch.ones(4), None, None, None, torch.tensor([0]), torch.int32)\n"
        "assert (k.linear_w8a8(*args) == 1500 * 127 * 127).all()\n"
        "print(k.backend('linear_w8a8', 'cpu'))",
        ONEDNN_MAX_CPU_ISA="AVX2",
    )
    # A oneDNN without the flaw has nothing to announce; the integers are right either way.
    assert "('cpu', None)" in output or output.count("saturates on this CPU") == 2


def test_the_reference_is_announced_where_it_stands_in(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "diffusers_dq_kernels"):
        _library._announced("quantize_static", lambda x: x)(torch.empty(1, device="meta"))
    assert any("no kernel for device type 'meta'" in message for message in caplog.messages)


def test_imports_only_torch_and_triton() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module is not None and node.module.partition(".")[0] in allowed, file


def test_kernels_folder_is_a_source_root_and_not_a_package() -> None:
    assert not (PACKAGE.parent / "__init__.py").exists()
