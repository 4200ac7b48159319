# SPDX-License-Identifier: Apache-2.0
"""diffusers' mixins for quantizers on ours, by architecture. What cannot pass is in limits.py, and must not pass.

Run by tests/host/run.py, with diffusers' folder `tests` in front of all others; never collected by `make test`.
"""

import tempfile
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from limits import limit
from tests.models.testing_utils.quantization import QuantizationCompileTesterMixin, QuantizationTesterMixin
from tests.models.transformers.test_models_dit_transformer2d import DiTTransformer2DTesterConfig
from tests.models.transformers.test_models_pixart_transformer2d import PixArtTransformer2DTesterConfig
from tests.models.transformers.test_models_transformer_flux import FluxTransformerTesterConfig
from tests.models.transformers.test_models_transformer_latte import LatteTransformerTesterConfig
from tests.models.transformers.test_models_transformer_sd3 import (
    SD3TransformerTesterConfig,
    SD35TransformerTesterConfig,
)
from tests.models.transformers.test_models_transformer_wan import WanTransformer3DTesterConfig

import diffusers_dq as dq
from diffusers_dq.linear import QuantizedLinear

ARCHITECTURES = {
    "DiT": DiTTransformer2DTesterConfig,
    "PixArt": PixArtTransformer2DTesterConfig,
    "Flux": FluxTransformerTesterConfig,
    "SD3": SD3TransformerTesterConfig,
    "SD35": SD35TransformerTesterConfig,
    "Wan": WanTransformer3DTesterConfig,
    "Latte": LatteTransformerTesterConfig,
}
CONFIGS = {"w8a8": dict(method="rtn"), "w4a8": dict(method="rtn", weight_bits=4)}
CHECKS = (
    "quantization_num_parameters",
    "quantization_memory_footprint",
    "quantization_inference",
    "quantization_dtype_assignment",
    "quantization_lora_inference",
    "quantization_serialization",
    "quantization_sharded_serialization",
    "quantization_config_serialization",
    "quantization_modules_to_not_convert",
    "quantization_device_map",
    "quantization_cpu_device_map",
    "quantization_training",
    "original_dtype",
    "quantized_layers",
    "keep_modules_in_fp32",
    "dequantize",
)
COMPILE_CHECKS = "torch_compile", "torch_compile_with_group_offload"
EXCLUDED = ["to_k"]


@cache
def saved(tester: type) -> tempfile.TemporaryDirectory[str]:
    """A model of the architecture's test, with random weights; the folder goes with the process."""
    torch.manual_seed(0)
    config, folder = tester(), tempfile.TemporaryDirectory(prefix="diffusers_dq_host_")
    config.model_class(**config.get_init_dict()).save_pretrained(folder.name)
    return folder


class OnOurs:
    """What the mixins ask of a backend, in front of an architecture's test configuration."""

    pretrained_model_kwargs: dict[str, Any] = {}

    @property
    def pretrained_model_name_or_path(self) -> str:
        return saved(self.architecture).name  # type: ignore[attr-defined]

    def _create_quantized_model(self, config_kwargs: dict[str, Any], **more: Any) -> Any:
        config = dq.DQConfig(**config_kwargs)
        return self.model_class.from_pretrained(  # type: ignore[attr-defined]
            self.pretrained_model_name_or_path, quantization_config=config, **more
        )

    def _verify_if_layer_quantized(self, name: str, module: Any, config_kwargs: dict[str, Any]) -> None:
        assert isinstance(module, QuantizedLinear), f"{name} is a {type(module).__name__}"

    def check(self, name: str, config: dict[str, Any], tmp_path: Any) -> None:
        if name == "quantization_serialization":
            self._test_quantization_serialization(config, tmp_path)  # type: ignore[attr-defined]
        elif name == "quantization_sharded_serialization":
            self._test_quantization_serialization(config, tmp_path, "auto")  # type: ignore[attr-defined]
        elif name == "quantization_modules_to_not_convert":
            everything = config | {"modules_to_not_convert": []}  # a list of one's own replaces the architecture's
            self._test_quantization_modules_to_not_convert(everything, EXCLUDED)  # type: ignore[attr-defined]
        else:
            getattr(self, f"_test_{name}")(config)


def class_of(name: str, mixin: type, checks: tuple[str, ...], configs: Iterable[str]) -> type:
    """The checks on an architecture as a class of tests."""
    tester = ARCHITECTURES[name]
    cases = []
    for check in checks:
        for config in configs:
            why = limit(name, check, config)
            marks = [] if why is None else [pytest.mark.xfail(strict=True, reason=why.reason, raises=why.raises)]
            cases.append(pytest.param(check, CONFIGS[config], marks=marks, id=f"{check}-{config}"))

    @pytest.mark.parametrize("check, config", cases)
    def test(self: Any, check: str, config: dict[str, Any], tmp_path: Any) -> None:
        self.check(check, config, tmp_path)

    return type(f"Test{name}{mixin.__name__}", (OnOurs, tester, mixin), {"architecture": tester, "test_host": test})


for _name in ARCHITECTURES:
    for _class in (
        class_of(_name, QuantizationTesterMixin, CHECKS, CONFIGS),
        class_of(_name, QuantizationCompileTesterMixin, COMPILE_CHECKS, ["w8a8"]),
    ):
        _class.test_quantization_sharded_serialization = None  # type: ignore[attr-defined]  # is among the checks
        globals()[_class.__name__] = _class
del _name, _class
