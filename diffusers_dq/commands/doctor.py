# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq doctor`"""

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import typer
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement

import diffusers_dq_kernels as ops
from diffusers_dq.commands.console import emit
from diffusers_dq.commands.options import Json
from diffusers_dq.hardware import cpu_field, name_of, version_of, versions

OPS = tuple(name for name in ops.__all__ if hasattr(getattr(ops, name), "op"))  # those of torch.library
# What an extra's absence means, where its name does not say it.
_WITHOUT = {"text": "pipelines with a text encoder cannot be loaded, class-conditional ones can"}
# How the CPU forms of ops compute that are more than torch's elementwise operations.
_CPU_WAYS = {
    "linear_w8a8": "int8 product by torch._int_mm (oneDNN)",
    "linear_w4a8": "unpacked to int8, product by torch._int_mm (oneDNN)",
    "linear_grouped": "unpacked to int8, a product by torch._int_mm (oneDNN) for each group",
    "linear_w8a16": "weight widened to floating point, product by torch.mm",
    "linear_w4a16": "weight unpacked and widened to floating point, product by torch.mm",
    "attention_int8": "two integer products about a softmax, in blocks",
}
_LITTLE = 5 * 2**30  # bytes: less than many a published transformer


@dataclass(frozen=True)
class Finding:
    """level: "ok", "advice" (slower, or something optional is missing) or "broken".   do: what helps."""

    level: str
    what: str
    do: str = ""


def doctor(json: Json = False) -> None:
    """Which kernels run on this machine and why, and what to install.

    Exit code 1 where something that is needed is missing, too old or gives wrong numbers.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    backends = {device: {op: ops.backend(op, device) for op in OPS} for device in devices}
    installed, wrong = _packages()
    findings = [*wrong, *_hardware(), *_arithmetic(devices), *_disk()]
    content = {
        "versions": installed,
        "devices": _devices(),
        "backends": {
            device: {op: {"backend": name, "why": _why(op, name, reason)} for op, (name, reason) in found.items()}
            for device, found in backends.items()
        },
        "cache": {"folder": HF_HUB_CACHE, "free_bytes": _free(Path(HF_HUB_CACHE))},
        "findings": [asdict(finding) for finding in findings],
        "healthy": not any(finding.level == "broken" for finding in findings),
    }
    emit(content, _text(content, findings), as_json=json)
    if not content["healthy"]:
        raise typer.Exit(1)


def _why(op: str, backend: str, reason: str | None) -> str:
    """reason: why it is not the quick form, None where it is."""
    if reason is not None:
        return reason
    if backend == "triton":
        return f"Triton {version_of('triton')}, a kernel for {torch.cuda.get_device_name()}"
    return _CPU_WAYS.get(op, "torch's vectorised operations; fused where torch.compile is used")


def _packages() -> tuple[dict[str, str | None], list[Finding]]:
    """Versions of all that the package names; what is wrong of needed ones is broken, of optional ones advice."""
    found = versions(["diffusers-dq"])
    missing: dict[str, list[str]] = {}
    findings = []
    for text in metadata.requires("diffusers-dq") or ():
        requirement = Requirement(text)
        extra = _extra_of(requirement)
        if extra == "dev" or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
            continue
        version = found[requirement.name] = version_of(requirement.name)
        if version is None and extra:
            missing.setdefault(extra, []).append(requirement.name)
        elif version is None:
            what = f"{requirement.name} is not installed, which diffusers-dq needs"
            # without Triton everything runs, on a GPU slowly
            level = "advice" if requirement.name == "triton" and not torch.cuda.is_available() else "broken"
            findings.append(Finding(level, what, f"pip install '{requirement.name}{requirement.specifier}'"))
        elif not requirement.specifier.contains(version, prereleases=True):
            who = f"diffusers-dq[{extra}]" if extra else "diffusers-dq"
            what = f"{requirement.name} is {version}, {who} needs {requirement.specifier}"
            level = "advice" if extra else "broken"
            findings.append(Finding(level, what, f"pip install '{requirement.name}{requirement.specifier}'"))
    for extra, names in missing.items():
        what = f"without {', '.join(names)}: {_WITHOUT.get(extra, f'extra {extra!r}')}"
        findings.append(Finding("advice", what, f"pip install 'diffusers-dq[{extra}]'"))
    return dict(sorted(found.items())), findings


def _extra_of(requirement: Requirement) -> str:
    """Of the marker `extra == "..."`; "" for none."""
    marker = str(requirement.marker or "")
    return marker.partition('extra == "')[2].partition('"')[0]


def _devices() -> dict[str, Any]:
    found: dict[str, Any] = {
        "cpu": {
            "name": name_of("cpu"),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "onednn": torch.backends.mkldnn.is_available(),
            "vnni": _vnni(),
        }
    }
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        capability = f"{properties.major}.{properties.minor}"
        found[f"cuda:{i}"] = {"name": properties.name, "bytes": properties.total_memory, "capability": capability}
    return found


def _vnni() -> bool | None:
    """Whether the CPU multiplies int8 exactly in one instruction; None where the system does not say."""
    flags = cpu_field("flags") or cpu_field("Features")
    return None if flags is None else bool({"avx512_vnni", "avx_vnni", "asimddp"} & set(flags.split()))


def _hardware() -> list[Finding]:
    findings = []
    caveat = ops.backend("linear_w8a8", "cpu")[1]
    if caveat:
        findings.append(Finding("advice", f"CPU: {caveat}", "a CPU with AVX-512 VNNI or AVX-VNNI, or a GPU"))
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            why, do = f"torch {torch.__version__} is built without CUDA", "with an NVIDIA GPU: a CUDA build of torch"
        else:
            why, do = "torch sees no GPU", "nvidia-smi says whether the driver does; see CUDA_VISIBLE_DEVICES too"
        findings.append(Finding("advice", f"no GPU: {why}; models run on the CPU", do))
    elif ops.backend("linear_w8a8", "cuda")[0] != "triton":
        reason = ops.backend("linear_w8a8", "cuda")[1]
        findings.append(Finding("broken", f"on the GPU {reason}", "pip install 'triton>=3.4,<3.8'"))
    return findings


def _arithmetic(devices: list[str]) -> list[Finding]:
    """Runs the int8 products on each device and compares them with int64 arithmetic, which they must equal exactly,
    and rounds a tensor per token, of which no value may be off by more than half a step."""
    checks: dict[str, Callable[[str], bool]] = {
        "int8 product": _product,
        "int4 product": _packed_product,
        "rounding per token": _rounding,
    }
    return [_tried(f"{name} on {device}", functools.partial(check, device)) for device in devices
            for name, check in checks.items()]  # fmt: skip


def _tried(what: str, check: Callable[[], bool]) -> Finding:
    try:
        right = check()
    except Exception as error:
        return Finding("broken", f"{what} fails: {' '.join(str(error).split())[:300]}", "reinstall torch and triton")
    if not right:
        return Finding("broken", f"{what} gives wrong numbers", "report it, with the versions above")
    return Finding("ok", f"{what} is right")


def _product(device: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (32, 64), generator=generator, dtype=torch.int8)
    weight = torch.randint(-127, 128, (48, 64), generator=generator, dtype=torch.int8)
    scales = torch.ones(48, device=device), torch.ones(32, device=device)  # of weight and input, not used in int32
    group = torch.zeros(1, dtype=torch.long, device=device)
    y = ops.linear_w8a8(x.to(device), weight.to(device), *scales, None, None, None, group, torch.int32)
    return torch.equal(y.cpu().long(), x.long() @ weight.long().t())


def _packed_product(device: str) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (32, 64), generator=generator, dtype=torch.int8)
    weight = torch.randint(-8, 8, (48, 64), generator=generator, dtype=torch.int8)
    scales = torch.ones(48, device=device), torch.ones(32, device=device)
    group = torch.zeros(1, dtype=torch.long, device=device)
    packed = ops.pack_int4(weight).to(device)
    y = ops.linear_w4a8(x.to(device), packed, *scales, None, None, None, group, torch.int32, None)
    return torch.equal(y.cpu().long(), x.long() @ weight.long().t())


def _rounding(device: str) -> bool:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(device)
    q, scale = ops.quantize_dynamic(x, torch.zeros(1, dtype=torch.long, device=device), None, None, 8)
    steps = (x / scale.view(-1, 1)).double() - q.double()
    return bool(steps.abs().max() <= 0.5 + 1e-5)  # fp32's division


def _disk() -> list[Finding]:
    cache = Path(HF_HUB_CACHE)
    free = _free(cache)
    findings = []
    if free < _LITTLE:
        what = f"{free / 2**30:.1f} GiB free for {cache}, less than many a model takes"
        findings.append(Finding("advice", what, "hf cache ls shows what is there; HF_HOME moves the folder"))
    if not os.access(_existing(cache), os.W_OK):
        findings.append(Finding("advice", f"{cache} cannot be written to: nothing can be downloaded", "set HF_HOME"))
    return findings


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _free(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def _text(content: dict[str, Any], findings: list[Finding]) -> str:
    lines = ["versions"]
    lines += [f"  {name:<18} {version or 'not installed'}" for name, version in content["versions"].items()]
    lines.append("devices")
    for device, about in content["devices"].items():
        facts = ", ".join(f"{key} {value}" for key, value in about.items() if key != "name")
        lines.append(f"  {device:<18} {about['name']}: {facts}")
    for device, found in content["backends"].items():
        lines.append(f"kernels on {device}")
        for op, entry in found.items():
            lines.append(f"  {op:<22} {entry['backend']:<10} {entry['why']}")
    cache = content["cache"]
    lines.append(f"models are kept in {cache['folder']}, {cache['free_bytes'] / 2**30:.1f} GiB free")
    lines.append("findings")
    for finding in findings:
        lines.append(f"  {finding.level:<7} {finding.what}" + (f"\n          -> {finding.do}" if finding.do else ""))
    lines.append(
        "all that is needed works" if content["healthy"] else "something that is needed does not work, see above"
    )
    return "\n".join(lines)
