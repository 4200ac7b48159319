# SPDX-License-Identifier: Apache-2.0
"""The hooks that diffusers calls while it loads and saves a model: no arithmetic, only who is asked what and when."""

import copy
import logging
import re
from dataclasses import replace
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

import diffusers_dq_kernels as ops
from diffusers_dq import guards, installation
from diffusers_dq.config import DQConfig, DQMethod
from diffusers_dq.conversion import Conversion, convert
from diffusers_dq.denoise import TimestepArgument
from diffusers_dq.files import Checksum, check_seal, sealed
from diffusers_dq.installation import Description
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.modulation import Modulation
from diffusers_dq.statistics import Statistics

logger = logging.getLogger(__name__)


class DQQuantizer(DiffusersQuantizer):
    """One model's quantizer, in one of four roles that follow from its config and what it is given.

    - a saved quantized model is loaded: layers are laid out first, tensors fill them as they come;
    - a full-precision model is quantized weight by weight while it loads (methods that need no statistics);
    - a full-precision model is loaded, then quantized (config has a statistics path);
    - a full-precision model is loaded and left *prepared* (statistics are needed, none are given):
      `dq.calibrate(pipe)` and `dq.quantize(pipe)` finish it, and saving it before is an error.
    """

    use_keep_in_fp32_modules = True
    quantization_config: DQConfig
    statistics: Statistics | None = None

    def __init__(self, quantization_config: DQConfig, **kwargs: Any) -> None:
        """pre_quantized: whether the config is of the model's config.json, as diffusers says there, and only there."""
        super().__init__(quantization_config, **kwargs)
        result = quantization_config.result
        if kwargs.get("pre_quantized") and result is None and quantization_config.statistics is not None:
            raise ValueError(
                f"the quantization_config in config.json names statistics, {quantization_config.statistics!r}, and"
                " whoever wrote it is not to choose what is read or downloaded: take it out of config.json, and pass"
                " quantization_config=dq.DQConfig(..., statistics=...) yourself"
            )
        self.description = None if result is None else Description.from_dict(result)
        # from_single_file claims every model to be quantized already: what is true is in the config.
        self.pre_quantized = self.description is not None
        self.prepared = False
        self._conversion: Conversion | None = None
        self._dtype = torch.get_default_dtype()
        self._loaded_keys: set[str] = set()
        self._checksum = Checksum()

    # Before loading

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called twice, the second time with the resolved device map."""
        places = device_map.values() if isinstance(device_map, dict) else ()
        if "disk" in places:
            raise ValueError(
                "device_map puts parts of the model on disk, where diffusers bypasses quantizers; give it more memory"
                " (max_memory) or use offloading hooks after loading"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """As everywhere in diffusers, None is fp32: a pipeline's parts have to agree."""
        self._dtype = torch_dtype or torch.get_default_dtype()
        if self.description is not None:
            self.description = replace(self.description, dtype=self._dtype)
        return self._dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self._loaded_keys = set(loaded_keys)
        return loaded_keys

    @property
    def supports_parallel_loading(self) -> bool:
        return self.pre_quantized  # else layers are swapped while the shards are read

    def _process_model_before_weight_loading(self, model: ModelMixin, **kwargs: Any) -> None:
        config = self.quantization_config
        if not getattr(model, "_no_split_modules", None):  # device_map="auto" asks, and many classes do not say
            model._no_split_modules = installation.repeated_blocks(model)
        if self.description is not None:
            installation.install_skeleton(model, self.description)
            return
        TimestepArgument.of(model)  # raises for what does not denoise, as a VAE
        needs_statistics = config.needs_statistics or bool(config.quantize_attention)
        self.prepared = needs_statistics and config.statistics is None
        if not needs_statistics:
            self._conversion = Conversion(model, config, None, self._dtype)

    # While tensors arrive

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        return [key for key in missing_keys if not self._is_tied_copy(key)]

    def _is_tied_copy(self, key: str) -> bool:
        return self.description is not None and any(key.startswith(f"{name}.") for name in self.description.tied)

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        if self.pre_quantized:
            return True  # every tensor is compared with what config.json says, ours and others
        return self._conversion is not None and self._linear_of(param_name) in self._conversion.plan.linears

    @staticmethod
    def _linear_of(param_name: str) -> str:
        return param_name.removesuffix(".weight") if param_name.endswith(".weight") else ""

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Called where the shapes differ."""
        rows, columns = (*current_param.shape, 0, 0)[:2]
        if self._is_packed(param_name) and tuple(loaded_param.shape) == (rows, columns // 4 * 3):
            return True
        self._refuse_shape(param_name, current_param, loaded_param)
        return False

    @staticmethod
    def _refuse_shape(param_name: str, current_param: Tensor, loaded_param: Tensor) -> None:
        raise ValueError(
            f"{param_name} has shape {tuple(loaded_param.shape)} in the file, config.json says"
            f" {tuple(current_param.shape)}: the file is damaged or not the one that belongs to this config"
        )

    def create_quantized_param(
        self,
        model: ModelMixin,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """`param_value` has been cast to the model's dtype by now; the tensor of the file is in `state_dict`."""
        stored = state_dict[param_name]
        if self.pre_quantized:
            self._checksum.add(param_name, stored)
            if self._is_packed(param_name) and stored.dtype == torch.uint8:
                stored = ops.unpack_int6(stored)
            if stored.shape != _tensor(model, param_name).shape:
                self._refuse_shape(param_name, _tensor(model, param_name), stored)
            expected, own = _tensor(model, param_name).dtype, installation.is_own(model, param_name)
            if not _fits(stored.dtype, expected, own):
                raise ValueError(
                    f"{param_name} is {stored.dtype} in the file, expected {expected}: the file is damaged"
                )
            module = model.get_submodule(param_name.rpartition(".")[0])
            if isinstance(module, QuantizedLinear | Modulation) and not torch.isfinite(stored).all():
                raise ValueError(f"{param_name} holds NaN or infinite values: the file is damaged")
            _set_tensor(model, param_name, (stored.to(expected) if own else param_value).to(target_device))
            if isinstance(module, QuantizedLinear) and module.is_whole:
                module.finish_loading()  # now: with a device_map diffusers moves the model before it asks us again
            return
        assert self._conversion is not None
        name = self._linear_of(param_name)
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        loaded = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        loaded.weight = nn.Parameter(stored.to(target_device), requires_grad=False)
        loaded.bias = linear.bias  # on meta still, or loaded already; loading goes on by name
        model.set_submodule(name, self._conversion.build(name, loaded))

    # After loading

    def _process_model_after_weight_loading(self, model: ModelMixin, **kwargs: Any) -> ModelMixin:
        config = self.quantization_config
        self._check_complete(model)
        if self.description is not None:
            check_seal(config.result or {}, self._checksum)
            installation.check_shared(model, self.description)
            getattr(model, installation.GROUPS).to(model.device)
            self.adopt(model, config.copy(result=self.description.to_dict()))
        elif self.prepared:
            model.is_quantized = False  # its weights are still as they were
            logger.warning(
                "%s is loaded in full precision, prepared for method %r: run dq.calibrate(pipe, ...) and"
                " dq.quantize(pipe)",
                type(model).__name__,
                config.method,
            )
        elif self._conversion is not None:
            self.adopt(model, self._conversion.finish())
            self._conversion = None
        else:
            assert config.statistics is not None
            statistics = Statistics.load(config.statistics)
            self.adopt(model, convert(model, config, statistics, dtype=model.dtype, progress=False))
        return model

    def adopt(self, model: ModelMixin, config: DQConfig) -> None:
        """The model is quantized as `config.result` says: be its quantizer."""
        assert config.result is not None
        self.quantization_config, self.description = config, Description.from_dict(config.result)
        self.pre_quantized, self.prepared, self.statistics = True, False, None
        installation.align(model)
        installation.keep_boundaries(model)
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = DQMethod.DIFFUSERS_DQ
        model.register_to_config(quantization_config=config)
        guards.protect(model, config.method)

    def _check_complete(self, model: ModelMixin) -> None:
        """diffusers leaves missing tensors on the meta device and skips extra ones with no more than a warning."""
        expected = model.state_dict()
        missing = sorted(name for name, tensor in expected.items() if tensor.device.type == "meta")
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        loaded = self._loaded_keys if self.pre_quantized else set()
        surplus = {key for key in loaded if key not in expected or self._is_tied_copy(key)}
        extra = [key for key in sorted(surplus) if not any(re.search(p, key) for p in ignored)]
        if missing or extra:
            raise ValueError(
                f"the file does not hold the tensors that config.json describes: {len(missing)} missing"
                f" ({', '.join(missing[:3])}), {len(extra)} extra ({', '.join(extra[:3])}); it is damaged or belongs"
                " to another model"
            )

    # Saving and leaving

    @property
    def is_serializable(self) -> bool:
        """Raises ValueError for a prepared model: there is nothing quantized to save yet."""
        if self.prepared:
            raise ValueError(
                f"the model is prepared for {self.quantization_config.method!r} but not quantized; run"
                " dq.calibrate(pipe, ...) and dq.quantize(pipe) before saving it"
            )
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Without the copies of tied modules, which the file holds once; 6-bit weights packed."""
        if not safe_serialization:
            raise ValueError("a quantized model is saved with safe_serialization=True only: nothing here is unpickled")
        adapted = next((key for key in state_dict if ".base_layer." in key), None)
        if adapted is not None:
            raise ValueError(
                f"an adapter is loaded ({adapted}), and a quantized model is saved without: save the adapter on its"
                " own (save_lora_weights of the pipeline, save_lora_adapter of the transformer), unload it"
                " (unload_lora_weights, unload_lora), then save the model"
            )
        kept = {key: value for key, value in state_dict.items() if not self._is_tied_copy(key)}
        stored = {key: ops.pack_int6(value) if self._is_packed(key) else value for key, value in kept.items()}
        return stored, {}

    def seal(self, model: ModelMixin) -> None:
        """Put the checksum of what will be saved into the configuration that will be."""
        tensors, _ = self.get_state_dict_and_metadata(model.state_dict(), safe_serialization=True)
        config: DQConfig = model.config.quantization_config
        config.result = sealed(config.result or {}, tensors)

    def _is_packed(self, key: str) -> bool:
        """Whether a file holds this tensor with four 6-bit values in three bytes; in memory they are int8."""
        name, _, leaf = key.rpartition(".")
        layout = None if self.description is None else self.description.linears.get(name)
        return leaf == "weight" and layout is not None and layout.weight_bits == 6

    def _dequantize(self, model: ModelMixin) -> ModelMixin:
        """Ordinary linears again, with what rounding has left; refused, before anything changes, where the timestep
        group has become part of the function, or what blocks are called with has been changed to suit their layers."""
        if self.description is not None and self.description.modulations:
            raise ValueError(
                f"cannot dequantize: transforms of {len(self.description.modulations)} blocks are folded into the"
                f" modulation that they are called with, and no part of an ordinary {type(model).__name__} can hold"
                " them: load the original checkpoint instead of dequantizing"
            )
        linears = {}
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                try:
                    linears[name] = module.dequantized(model.dtype)
                except ValueError as error:
                    raise ValueError(f"cannot dequantize {name}: {error}") from None
        guards.unprotect(model)
        if self.description is not None:
            installation.uninstall(model, self.description)
        for name, linear in linears.items():
            model.set_submodule(name, linear)
        private = ("quantization_config", "_pre_quantization_dtype")
        model._internal_dict = FrozenDict({key: value for key, value in model.config.items() if key not in private})
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> "DQQuantizer":
        twin = copy.copy(self)
        twin.quantization_config = copy.deepcopy(self.quantization_config, memo)
        return twin


def _fits(stored: torch.dtype, expected: torch.dtype, own: bool) -> bool:
    """Integers have one dtype, tables have at least fp32, and tensors of the model come in any precision."""
    if not expected.is_floating_point:
        return stored == expected
    return stored.is_floating_point and (not own or stored.itemsize >= torch.float32.itemsize)


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor


def _set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def register() -> None:
    """Make diffusers know us. Its two dictionaries are the only way in: there is no entry point (0.42)."""
    key = DQMethod.DIFFUSERS_DQ.value
    for mapping, entry in ((AUTO_QUANTIZER_MAPPING, DQQuantizer), (AUTO_QUANTIZATION_CONFIG_MAPPING, DQConfig)):
        known = mapping.setdefault(key, entry)
        if known is not entry:
            raise ImportError(f"diffusers already knows a quantizer {key!r}: {known}; two packages cannot both be it")
