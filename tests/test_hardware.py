# SPDX-License-Identifier: Apache-2.0
import platform
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from diffusers_dq import card_facts, hardware
from diffusers_dq.benchmark import environment
from diffusers_dq.commands import doctor
from diffusers_dq.evaluation.provenance import provenance

TWO_PROCESSORS = "processor\t: 0\nmodel name\t: A 9: fast\nflags\t\t: sse avx2\n\nmodel name\t: B\nflags\t\t: none\n"


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text(TWO_PROCESSORS)
    monkeypatch.setattr(hardware, "_CPU", file)
    return file


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Two committed files in a git repository of its own."""
    folder = tmp_path / "checkout"
    (folder / "made").mkdir(parents=True)
    for name in ("source.py", "made/table.md"):
        (folder / name).write_text("one\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "one"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    monkeypatch.setattr(hardware, "CHECKOUT", folder)
    return folder


def test_a_cpu_is_called_what_the_system_calls_it(cpuinfo):
    assert hardware.name_of("cpu") == hardware.name_of(torch.device("meta")) == "A 9: fast"
    assert hardware.cpu_field("flags") == "sse avx2" and hardware.cpu_field("model") is None
    cpuinfo.unlink()
    assert hardware.cpu_field("flags") is None
    assert hardware.name_of("cpu") == (platform.processor() or platform.machine())


def test_a_gpu_is_called_what_its_driver_calls_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"G{device.index}")
    assert hardware.name_of("cuda:1") == "G1" and hardware.name_of("cuda") == "GNone"


def test_whoever_notes_the_hardware_notes_the_same(cpuinfo):
    names = [
        provenance("cpu")["hardware"],
        environment.about("cpu")["hardware"],
        doctor._devices()["cpu"]["name"],
        card_facts.machine(torch.device("cpu"))["hardware"],
    ]
    assert names == ["A 9: fast"] * 4


def test_versions_are_those_installed():
    found = hardware.versions(["torch", "no-such-package"])
    assert found == {"python": platform.python_version(), "torch": metadata.version("torch"), "no-such-package": None}


def test_the_source_is_the_checkout_that_runs(checkout):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    assert len(head) == 40 and hardware.source() == {"commit": head, "dirty": False}
    (checkout / "made" / "table.md").write_text("two\n")
    assert hardware.source()["dirty"] is True and hardware.source("made")["dirty"] is False
    (checkout / "new.py").touch()
    assert hardware.source("made")["dirty"] is True


def test_a_folder_of_somebody_elses_checkout_is_no_source(checkout, monkeypatch):
    monkeypatch.setattr(hardware, "CHECKOUT", checkout / "made")
    assert hardware.source() == {"commit": None, "dirty": None}


def test_what_is_missing_or_fails_is_none():
    assert hardware.output_of([sys.executable, "-c", "print(' 1 ')"]) == "1"
    assert hardware.output_of([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert hardware.output_of(["no-such-command"]) is None
