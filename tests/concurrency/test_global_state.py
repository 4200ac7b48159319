# SPDX-License-Identifier: Apache-2.0
"""A whole run leaves no trace in the process: not in our modules, not in torch's, diffusers' or Python's own."""

import os
import sys
import types

import diffusers
import pytest
import torch
from diffusers import DiTPipeline
from support import CALLS

import diffusers_dq as dq

CACHES = {
    "diffusers_dq.guards._guarded": "of a class of models",
    "diffusers_dq_kernels._gemm.capability": "of a device",
    "diffusers_dq_kernels._int_matmul.int_mm_caveat": "of torch's build and the processor",
    "diffusers_dq_kernels._library.announce": "what has been said once",
    "diffusers_dq_kernels._tiles._pick": "of a product's shape and a device",
    "diffusers_dq_kernels._tiles._user_tables": "of files of tiles, read once",
    "diffusers_dq_kernels._tiles.known_ops": "of files of tiles, read once",
    "diffusers_dq_kernels._tiles.shipped_tables": "of files of tiles, read once",
    "diffusers_dq_kernels.hadamard._small_matrices": "of an order, 64 at most",
}
PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device)


def modules():
    return {
        name: module
        for name, module in sorted(sys.modules.items())
        if name.partition(".")[0] in ("diffusers_dq", "diffusers_dq_kernels")
    }


def frozen(value, seen=()):
    """What a value is, in something that does not change with it."""
    if isinstance(value, PLAIN) or id(value) in seen:
        return repr(value) if isinstance(value, PLAIN) else "..."
    seen = (*seen, id(value))
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.tolist()
    if isinstance(value, dict):
        return {repr(key): frozen(item, seen) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value).__name__, [frozen(item, seen) for item in value]
    if isinstance(value, type):
        own = value.__module__.partition(".")[0] in ("diffusers_dq", "diffusers_dq_kernels")
        kept = {k: v for k, v in vars(value).items() if not k.startswith("__")} if own else {}
        return id(value), {key: frozen(item, seen) for key, item in kept.items() if not callable(item)}
    if type(value).__module__.partition(".")[0] in ("diffusers_dq", "diffusers_dq_kernels"):
        return type(value).__name__, frozen(dict(getattr(value, "__dict__", {})), seen)
    return id(value)


def state():
    return {
        (module, name): frozen(value)
        for module, content in modules().items()
        for name, value in vars(content).items()
        if not isinstance(value, types.ModuleType) and not name.startswith("__")
    }


def caches():
    """Names of functions with functools' caches: they remember what is a function of its arguments."""
    return {
        f"{module}.{name}"
        for module, content in modules().items()
        for name, value in vars(content).items()
        if hasattr(value, "cache_info") and getattr(value, "__module__", "") == module
    }


def surroundings():
    """What a library must not change behind its user's back."""
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    return {
        "environment": dict(os.environ),
        "path": list(sys.path),
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "random": torch.random.get_rng_state().tolist(),
        "quantizers": dict(AUTO_QUANTIZER_MAPPING),
        "configs": dict(AUTO_QUANTIZATION_CONFIG_MAPPING),
        "classes": {
            name: dict(vars(getattr(diffusers, name)))
            for name in ("DiTTransformer2DModel", "DiTPipeline", "DiffusionPipeline", "ModelMixin", "DDIMScheduler")
        },
        "linear": dict(vars(torch.nn.Linear)),
        "module": dict(vars(torch.nn.Module)),
        "hooks": len(torch.nn.modules.module._global_forward_hooks)
        + len(torch.nn.modules.module._global_forward_pre_hooks),
    }


def whole_run(folder, target):
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    statistics = dq.calibrate(pipe, CALLS, num_inference_steps=6, progress=False, checkpoint=target / "c")
    config = dq.DQConfig("htg", weight_bits=4, groups=2, guard_steps=(1, 1), noise_correction=True)
    dq.quantize(pipe, config, statistics=statistics, progress=False)
    pipe.save_pretrained(target / "model")
    for options in (dict(method="ptq4dit", rounding="adaround", reconstruction={"iterations": 1}), dict(method="rtn")):
        other = DiTPipeline.from_pretrained(folder)
        dq.quantize(other, dq.DQConfig(**options), statistics=statistics, progress=False)
    loaded = DiTPipeline.from_pretrained(target / "model")
    loaded.set_progress_bar_config(disable=True)
    loaded([1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np")
    dq.inspect(loaded)
    with pytest.raises(ValueError):
        dq.quantize(loaded, config, statistics=statistics, progress=False)


def test_a_whole_run_changes_nothing_outside_of_its_objects(dit_folder, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    whole_run(dit_folder, tmp_path / "first")  # imports what is imported lazily, fills caches
    before, around = state(), surroundings()
    whole_run(dit_folder, tmp_path / "second")
    after = state()
    assert before.keys() == after.keys()
    assert {key for key in after if before[key] != after[key]} == set()
    now = surroundings()
    assert {key for key in now if around[key] != now[key]} == set()


def test_the_caches_are_these():
    """Each keeps what its arguments alone decide; a new one has to be looked at and named here."""
    assert caches() == CACHES.keys()
