# SPDX-License-Identifier: Apache-2.0
"""Puts quantized layers into a model, and describes them so that a fresh process makes the same model from a file."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffusers_dq import attention, fusion, modulation, noise_correction
from diffusers_dq.attention import Softmax
from diffusers_dq.checks import check_argument
from diffusers_dq.denoise import TimestepArgument
from diffusers_dq.files import SEAL
from diffusers_dq.layout import ACTIVATION_BITS, LinearLayout
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.modulation import Modulation, ModulationLayout
from diffusers_dq.noise_correction import CorrectOutput, NoiseCorrection
from diffusers_dq.snapshot import Snapshot
from diffusers_dq.step_policy import StepBits
from diffusers_dq.timesteps import TimestepGroups

Module = TypeVar("Module", bound=nn.Module)

GROUPS = "timestep_groups"
BOUNDARIES = "timestep_boundaries"
_MOST_EDGES = 1 << 20  # of a table that a file declares: far above what any schedule has, far below any memory
_REPEATED = "_repeated_blocks"  # where diffusers looks for what compile_repeated_blocks compiles


@dataclass(frozen=True, kw_only=True)
class Description:
    """All that must be known of a quantized model before its tensors are; `DQConfig.result`, in config.json.

    linears, modulations: by module name.
    attention: quantized Attention modules, to attention_bits, their softmax rounded as `softmax` says.
    partitions: [P, E], the shape of the table of timestep boundaries.   descending: noise falls with the timestep.
    tied: module -> the one it is the same as.   shared: linear -> another that rounds the same input the same way.
    notes: linear -> why it is in full precision or what is odd about it.
    dtype: of the model's unrounded tensors.   step_bits: None where activations are rounded alike in every step.
    noise_correction: steps and channels of the NoiseCorrection, None where there is none.
    origin: the repository on the Hub that the model came from, None for one of this disk.
    """

    linears: Mapping[str, LinearLayout]
    attention: tuple[str, ...]
    attention_bits: int
    partitions: tuple[int, int]
    descending: bool
    tied: Mapping[str, str]
    notes: Mapping[str, str]
    dtype: torch.dtype
    shared: Mapping[str, str] = field(default_factory=dict)
    step_bits: StepBits | None = None
    noise_correction: tuple[int, int] | None = None
    softmax: Softmax = "uniform"
    modulations: Mapping[str, ModulationLayout] = field(default_factory=dict)
    origin: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"{self.dtype!r} is no dtype")
        self._check_kinds()
        partitions, edges = self.partitions
        followers: dict[str, LinearLayout | ModulationLayout] = {**self.linears, **self.modulations}
        if not 1 <= partitions <= max(1, len(followers)) or not 0 <= edges <= _MOST_EDGES:
            raise ValueError(
                f"partitions are {self.partitions}; of {len(followers)} layers that follow one there are as many at"
                f" most, of boundaries {_MOST_EDGES}"
            )
        for name, layout in followers.items():
            if layout.partition >= partitions:
                raise ValueError(f"{name} follows partition {layout.partition} of {partitions}")
            for table in ("bias_groups", "range_groups", "shift_groups", "offset_groups"):
                if getattr(layout, table, 0) not in (0, 1, edges + 1):
                    raise ValueError(f"{name} has {table} {getattr(layout, table)}, there are {edges + 1} groups or 1")
        if self.noise_correction is not None and not all(0 < n <= _MOST_EDGES for n in self.noise_correction):
            raise ValueError(f"noise_correction is of {self.noise_correction} steps and channels")
        for bits in self.step_bits.bits if self.step_bits is not None else ():
            if bits is not None and (type(bits) is not int or bits not in ACTIVATION_BITS):
                raise ValueError(f"step_bits are {ACTIVATION_BITS} or null, got {bits!r}")
        for name, first in self.shared.items():
            if not {name, first} <= self.linears.keys():
                raise ValueError(f"{name} shares its input with {first}; both have to be quantized linears")
            if name.rpartition(".")[0] != first.rpartition(".")[0]:
                raise ValueError(f"{name} shares its input with {first}, which is in another module")
        for name, of_block in self.modulations.items():
            if name.rpartition(".")[2] != of_block.leaf:
                raise ValueError(f"{name} is of the argument {of_block.argument}, so it is called {of_block.leaf}")
        if type(self.descending) is not bool:
            raise ValueError(f"descending is {self.descending!r}; true or false is expected")

    def _check_kinds(self) -> None:
        """What a file says has been checked by nothing else."""
        check_argument("descending", self.descending, bool)
        check_argument("attention_bits", self.attention_bits, int)
        check_argument("softmax", self.softmax, Softmax)
        check_argument("origin", self.origin, str | None)
        if self.attention and self.attention_bits not in ACTIVATION_BITS:
            raise ValueError(f"attention_bits are {ACTIVATION_BITS}, got {self.attention_bits}")
        for field_name in ("tied", "shared", "notes"):
            pairs = getattr(self, field_name)
            check_argument(field_name, pairs, Mapping)
            if not all(isinstance(value, str) for value in pairs.values()):
                raise ValueError(f"{field_name} must map names to texts, got {pairs!r}")
        if not all(isinstance(name, str) for name in self.attention):
            raise ValueError(f"attention must be names, got {self.attention!r}")
        originals = set(self.tied.values())
        places = originals | self.tied.keys()
        for name in places:
            inside = any(name[:end] in places for end in range(len(name)) if name[end] == ".")
            if not name or inside or (name in originals and name in self.tied):
                raise ValueError(f"tied must map copies to originals, none of them a part of another; {name!r} is")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {
            "linears": {name: layout.to_dict() for name, layout in self.linears.items()},
            "modulations": {name: layout.to_dict() for name, layout in self.modulations.items()},
            "attention": list(self.attention),
            "partitions": list(self.partitions),
            "dtype": str(self.dtype).removeprefix("torch."),
            "step_bits": None if self.step_bits is None else self.step_bits.to_dict(),
            "noise_correction": None if self.noise_correction is None else list(self.noise_correction),
        }

    @classmethod
    def from_dict(cls, result: Mapping[str, Any]) -> "Description":
        """Raises ValueError for what `to_dict` cannot have written."""
        try:
            partitions, edges = result["partitions"]
            parts = {
                "linears": {name: LinearLayout(**layout) for name, layout in result["linears"].items()},
                "modulations": {n: ModulationLayout(**layout) for n, layout in result.get("modulations", {}).items()},
                "attention": tuple(result["attention"]),
                "partitions": (int(partitions), int(edges)),
                "dtype": getattr(torch, result["dtype"], result["dtype"]),
                "noise_correction": _pair(result.get("noise_correction")),
                "step_bits": StepBits.from_dict(result["step_bits"]) if result.get("step_bits") else None,
            }
            return cls(**{**{key: value for key, value in result.items() if key != SEAL}, **parts})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the result in config.json's quantization_config cannot be understood ({error!r}): it is damaged or"
                " of another version of diffusers_dq; load the original file"
            ) from error


def _pair(value: Sequence[int] | None) -> tuple[int, int] | None:
    if value is None:
        return None
    first, second = value
    return int(first), int(second)


class SelectGroup:
    """Forward pre-hook of the model: writes the group of this forward's timestep where the layers read it."""

    def __init__(self, argument: TimestepArgument, descending: bool, step_bits: StepBits | None = None) -> None:
        self.argument = argument
        self.descending = descending
        self.step_bits = step_bits

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = self.argument.read(args, kwargs)
        if timestep is None:
            raise ValueError(
                f"{type(model).__name__} was called without a {self.argument.name}; it was quantized by timestep group"
                " and needs one"
            )
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep)
        groups = getattr(model, GROUPS)
        if hasattr(model, BOUNDARIES):
            boundaries = getattr(model, BOUNDARIES)
            groups.select(groups.kept if boundaries.is_meta else boundaries, timestep, self.descending)
        if self.step_bits is not None:  # waits for the device
            groups.activation_bits = self.step_bits.at(float(timestep.max() if self.descending else timestep.min()))


def install(
    model: nn.Module,
    description: Description,
    layers: Mapping[str, QuantizedLinear],
    modulations: Mapping[str, Modulation],
    groups: TimestepGroups,
    boundaries: Tensor,
    attention_scales: Mapping[str, Mapping[str, Tensor]] | None,
    correction: NoiseCorrection | None = None,
) -> None:
    """Replace linears by layers, share tied modules, quantize attention, select the group before each forward, change
    what blocks are called with.

    boundaries: [P, E]; without columns there is one group and nothing to select.
    attention_scales: Attention module -> operand -> [1]; None where a file will bring them.
    """
    select = None
    if boundaries.numel() or description.step_bits is not None:
        select = SelectGroup(TimestepArgument.of(model), description.descending, description.step_bits)
    before = Snapshot(model)
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        for name, first in description.shared.items():
            layers[name].share_input(layers[first])
        for copied, original in description.tied.items():
            model.set_submodule(copied, model.get_submodule(original))
        for name in description.attention:
            scales = None if attention_scales is None else attention_scales[name]
            attention.attach(
                model.get_submodule(name), description.attention_bits, scales, boundaries.device, description.softmax
            )
        if not getattr(model, _REPEATED, None):
            setattr(model, _REPEATED, repeated_blocks(model))
        model.add_module(GROUPS, groups)
        if boundaries.numel():
            model.register_buffer(BOUNDARIES, boundaries)
        if select is not None:
            model.register_forward_pre_hook(select, with_kwargs=True)
        modulation.attach_all(model, modulations)
        if correction is not None:
            model.add_module(noise_correction.NAME, correction)
            model.register_forward_hook(CorrectOutput(TimestepArgument.of(model)), with_kwargs=True)
        fusion.fuse(model)
    except BaseException:
        before.restore()
        raise


def uninstall(model: nn.Module, description: Description) -> None:
    """Undo `install` except for the layers: hook, buffers, shared modules, attention processors."""
    _remove_selection(model)
    fusion.unfuse(model)
    for copied, original in description.tied.items():
        model.set_submodule(copied, copy.deepcopy(model.get_submodule(original)))
    for name in description.attention:
        attention.detach(model.get_submodule(name))


def _remove_selection(model: nn.Module) -> None:
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, SelectGroup):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for block in model.modules():
        modulation.detach(block)
    for key, corrects in list(model._forward_hooks.items()):
        if isinstance(corrects, CorrectOutput):
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)
    for name in (GROUPS, BOUNDARIES, noise_correction.NAME):
        if hasattr(model, name):
            delattr(model, name)
    vars(model).pop(_REPEATED, None)


def repeated_blocks(model: nn.Module) -> list[str]:
    """Class names of the members of the model's outermost module lists: diffusers names none for DiT and PixArt."""
    names: set[str] = set()
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            names.update(type(block).__name__ for block in child)
        else:
            names.update(repeated_blocks(child))
    return sorted(names)


def identical(model: nn.Module, duplicates: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Of (copy, original) modules, those whose tensors are equal bit for bit: worth storing once."""
    return {copied: original for copied, original in duplicates if _equal(model, copied, original)}


def sharing(layers: Mapping[str, QuantizedLinear], groups: Sequence[Sequence[str]]) -> dict[str, str]:
    """Linear -> the first of its group, in the same module, that rounds the group's input in the same way.

    In the same module: text that all blocks read is one tensor for all of them, and what one compiled block left on it
    would be another's guard.
    """
    shared = {}
    for group in groups:
        firsts: list[str] = []
        for name in (name for name in group if name in layers and layers[name].layout.rounds_input):
            near = (first for first in firsts if first.rpartition(".")[0] == name.rpartition(".")[0])
            first = next((first for first in near if layers[name].reads_like(layers[first])), None)
            if first is None:
                firsts.append(name)
            else:
                shared[name] = first
    return shared


def check_shared(model: nn.Module, description: Description) -> None:
    """Raises ValueError where linears that share an input have unequal tables, as only a damaged file makes them."""
    for name, first in description.shared.items():
        if not _submodule(model, name, QuantizedLinear).reads_like(_submodule(model, first, QuantizedLinear)):
            raise ValueError(
                f"{name} and {first} share their rounded input by config.json, but their input tables differ in the"
                " file: it is damaged"
            )


def keep_boundaries(model: nn.Module) -> None:
    """Once they are there: see TimestepGroups."""
    if hasattr(model, BOUNDARIES):
        groups, boundaries = getattr(model, GROUPS), getattr(model, BOUNDARIES)
        groups.kept = boundaries.clone().to(groups.index.device)


def align(model: nn.Module) -> None:
    """Give every tensor the alignment of torch's own allocations: in a mapped file it begins at any eighth byte.

    MKL rounds differently by alignment, so a model would compute other bits after saving and loading than before; and
    torch._weight_int8pack_mm (2.13) crashes on a weight that is not aligned to 16 bytes.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _equal(model: nn.Module, copied: str, original: str) -> bool:
    ours, theirs = (model.get_submodule(name).state_dict() for name in (copied, original))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def install_skeleton(model: nn.Module, description: Description) -> None:
    """Give a model on the meta device the layers of a saved one, tensors still to come.

    Raises ValueError where the description names a module that the model lacks, or a layout that does not fit it.
    """
    groups = TimestepGroups(description.partitions[0])
    layers = {}
    for name, layout in description.linears.items():
        linear = _submodule(model, name, nn.Linear)
        bias = linear.bias is not None
        try:
            layout.check_width(linear.in_features)
        except ValueError as error:
            raise ValueError(f"the quantization_config in config.json is damaged: {name}: {error}") from None
        layers[name] = QuantizedLinear(
            linear.in_features, linear.out_features, bias, layout, groups, device="meta", dtype=description.dtype
        )
    for name in (*description.attention, *description.tied, *description.tied.values()):
        _submodule(model, name, nn.Module)
    for name in description.attention:
        if not hasattr(model.get_submodule(name), "processor"):
            raise ValueError(
                f"the quantization_config in config.json is damaged: attention names {name!r}, which has no processor"
            )
    modulations = {}
    for name, of_block in description.modulations.items():
        _submodule(model, name.rpartition(".")[0], nn.Module)
        modulations[name] = Modulation(of_block, groups, device="meta", dtype=description.dtype)
    correction = None
    if description.noise_correction is not None:
        correction = NoiseCorrection(*description.noise_correction, device="meta")
    boundaries = torch.empty(description.partitions, device="meta")
    install(model, description, layers, modulations, groups, boundaries, None, correction)


def _submodule(model: nn.Module, name: str, kind: type[Module]) -> Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, kind):
        raise ValueError(
            f"the quantization_config in config.json names {name}, which is no {kind.__name__} of this"
            f" {type(model).__name__}: the file belongs to another model"
        )
    return module


def is_own(model: nn.Module, name: str) -> bool:
    """Whether a tensor is one of ours, which diffusers must not cast on loading: integers and fp32 tables."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, QuantizedLinear):
        return leaf in dict(module.tables()) or (leaf == "weight" and module.layout.rounds_weight)
    return name == BOUNDARIES or isinstance(module, NoiseCorrection | Modulation) or attention.owns(module, leaf)
