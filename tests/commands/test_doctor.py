# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

import diffusers_dq_kernels as ops
from diffusers_dq.cli import app
from diffusers_dq.commands import doctor

runner = CliRunner()


def examined(exit_code=0):
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def levels(content):
    return {finding["what"]: finding["level"] for finding in content["findings"]}


def test_it_says_what_backend_each_op_takes_and_why():
    content = examined()
    for device, found in content["backends"].items():
        assert {"linear_w8a8", "linear_w4a8", "quantize_dynamic", "attention_int8"} <= found.keys()
        for op, entry in found.items():
            backend, reason = ops.backend(op, device)
            assert entry["backend"] == backend and len(entry["why"]) > 10 and entry["why"] == (reason or entry["why"])
    assert content["versions"]["torch"] == metadata.version("torch") and content["versions"]["diffusers"]
    assert content["devices"]["cpu"]["threads"] == torch.get_num_threads()
    assert content["cache"]["free_bytes"] > 0 and content["healthy"]
    assert levels(content)["int8 product on cpu is right"] == "ok"
    assert ("cuda" in content["backends"]) == torch.cuda.is_available()


def test_people_are_told_the_same():
    text = runner.invoke(app, ["doctor"]).stdout
    assert f"torch              {metadata.version('torch')}" in text and "kernels on cpu" in text
    assert "all that is needed works" in text


def test_a_wrong_product_is_broken_and_exit_code_1(monkeypatch):
    right = ops.linear_w8a8
    monkeypatch.setattr(ops, "linear_w8a8", lambda *arguments: right(*arguments) + 1)
    content = examined(exit_code=1)
    assert levels(content)["int8 product on cpu gives wrong numbers"] == "broken" and not content["healthy"]


def test_a_product_that_fails_is_broken(monkeypatch):
    def fails(device):
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(doctor, "_product", fails)
    assert levels(examined(exit_code=1))["int8 product on cpu fails: no such instruction"] == "broken"


@pytest.mark.parametrize(
    ("requires", "what", "level", "do", "code"),
    [
        ("numpy>=99", "numpy is 1.2, diffusers-dq needs >=99", "broken", "pip install 'numpy>=99'", 1),
        ("absent>=2", "absent is not installed, which diffusers-dq needs", "broken", "pip install 'absent>=2'", 1),
        (
            'absent>=2; extra == "eval"',
            "without absent: extra 'eval'",
            "advice",
            "pip install 'diffusers-dq[eval]'",
            0,
        ),
        ('numpy>=99; extra == "eval"', "numpy is 1.2, diffusers-dq[eval] needs >=99", "advice", "numpy>=99", 0),
        ('absent; extra == "dev"', None, None, None, 0),
        ('absent; platform_system == "Plan9"', None, None, None, 0),
    ],
)
def test_packages_that_are_missing_or_too_old(monkeypatch, requires, what, level, do, code):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: [requires])
    monkeypatch.setattr(doctor, "version_of", lambda package: None if package == "absent" else "1.2")
    content = examined(exit_code=code)
    about = [finding for finding in content["findings"] if "absent" in finding["what"] or "numpy" in finding["what"]]
    assert [(finding["what"], finding["level"]) for finding in about] == ([(what, level)] if what else [])
    assert all(do in finding["do"] for finding in about)


def test_a_cpu_without_vnni_and_a_gpu_without_triton(monkeypatch):
    monkeypatch.setattr(doctor.ops, "backend", lambda op, device: ("reference", "no such thing"))
    assert levels(examined())["CPU: no such thing"] == "advice"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [(f.level, f.what) for f in doctor._hardware()][-1] == ("broken", "on the GPU no such thing")


def test_vnni_is_read_from_the_cpu_flags(monkeypatch):
    for flags, expected in (("sse avx512_vnni", True), ("sse avx2", False), (None, None)):
        monkeypatch.setattr(doctor, "cpu_field", lambda name, flags=flags: flags)
        assert doctor._vnni() is expected


def test_a_full_disk_is_advice(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "HF_HUB_CACHE", str(tmp_path / "not" / "made" / "yet"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**29}))
    (finding,) = doctor._disk()
    assert finding.level == "advice" and finding.what.startswith(f"0.5 GiB free for {tmp_path}/not/made/yet")


def test_every_way_of_computing_is_of_an_op_that_has_it():
    assert doctor._CPU_WAYS.keys() <= {op for op in doctor.OPS if ops.backend(op, "cpu")[0] == "cpu"}
    assert {op for op in doctor.OPS if op.startswith(("linear", "attention"))} <= doctor._CPU_WAYS.keys()


@pytest.mark.parametrize(
    ("op", "what"),
    [
        ("linear_w4a8", "int4 product on cpu gives wrong"),
        ("quantize_dynamic", "rounding per token on cpu gives wrong"),
    ],
)
def test_wrong_numbers_of_other_ops_are_found(op, what, monkeypatch):
    right = getattr(ops, op)

    def wrong(*arguments):
        found = right(*arguments)
        return found + 1 if op == "linear_w4a8" else (found[0] + 1, *found[1:])

    monkeypatch.setattr(ops, op, wrong)
    assert [name for name, level in levels(examined(exit_code=1)).items() if level == "broken"] == [f"{what} numbers"]
