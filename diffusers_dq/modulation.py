# SPDX-License-Identifier: Apache-2.0
"""Changes the modulation that a block is called with, so that its norms put out what its linears are to read.

Where one projection serves all blocks (adaLN-single: PixArt, Wan, Open-Sora, ...) no weight can carry the change of a
single block's input; the few numbers that the block is called with can (methods.md 0.1c). They are made once a sample,
or once a token of a video whose frames are at different steps, not once a channel of every token.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffusers_dq.timesteps import TimestepGroups

_AT_ONCE = 1 << 24  # numbers; more are changed in pieces of so many channels
_PIECE = 1024


@dataclass(frozen=True, kw_only=True)
class ModulationLayout:
    """argument: of the block's forward.   channels: R, of all its chunks.   offset_groups: rows of the offsets.
    partition: which entry of TimestepGroups.index applies.   axis: of the chunks, where they have one of their own."""

    argument: str
    channels: int
    offset_groups: int
    partition: int = 0
    axis: int = -2

    def __post_init__(self) -> None:
        if not isinstance(self.argument, str) or not self.argument.isidentifier():
            raise ValueError(f"a modulation's argument must be a name, got {self.argument!r}")
        for name, least in (("channels", 1), ("offset_groups", 1), ("partition", 0)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"a modulation's {name} must be at least {least}, got {getattr(self, name)!r}")
        if self.axis not in (-2, 1) or type(self.axis) is not int:
            raise ValueError(f"a modulation's axis must be -2 or 1, got {self.axis!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def leaf(self) -> str:
        """What the module is called in its block, and in the file."""
        return f"{self.argument}_modulation"


class Modulation(nn.Module):
    """y -> multiplier y + offset_g, of the modulation y [..., R] or [..., n, C] with n C = R, n at the layout's axis.

    multiplier: [R], offset: [G, R], buffers, fp32 whatever the model is cast to (fp64 for an fp64 model).
    """

    multiplier: Tensor
    offset: Tensor
    partition: Tensor

    def __init__(
        self,
        layout: ModulationLayout,
        groups: TimestepGroups,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.layout = layout
        self._groups = (groups,)  # in a tuple: shared by all layers, a submodule of none of them
        table = torch.promote_types(dtype, torch.float32)
        self.register_buffer("multiplier", torch.ones(layout.channels, dtype=table, device=device))
        self.register_buffer("offset", torch.zeros(layout.offset_groups, layout.channels, dtype=table, device=device))
        place = None if device is None or torch.device(device).type == "meta" else device
        self.register_buffer("partition", torch.tensor([layout.partition], device=place), persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        if y.shape[-1] == self.layout.channels:
            return self._changed(y)
        chunked = y.movedim(self.layout.axis, -2)
        return self._changed(chunked.flatten(-2)).view_as(chunked).movedim(-2, self.layout.axis)

    def _changed(self, y: Tensor) -> Tensor:
        """y: [..., R]. A modulation of every token of a video is changed a piece at a time, for the sake of memory."""
        dtype, row = torch.promote_types(y.dtype, torch.float32), self._row()
        if y.numel() <= _AT_ONCE:
            return torch.addcmul(row, y.to(dtype), self.multiplier).to(y.dtype)
        changed = torch.empty_like(y)
        for start in range(0, self.layout.channels, _PIECE):
            piece = slice(start, start + _PIECE)
            changed[..., piece] = torch.addcmul(row[:, piece], y[..., piece].to(dtype), self.multiplier[piece])
        return changed

    def _row(self) -> Tensor:
        """[1, R], of the current timestep group. Traced, it does not depend on which: blocks share a graph."""
        if len(self.offset) == 1:
            return self.offset
        index = self._groups[0].index
        group = index.index_select(0, self.partition.to(index.device)).to(self.offset.device)
        return self.offset.index_select(0, group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves follow the module, casts do not reach the tables."""
        tables = dict(multiplier=self.multiplier, offset=self.offset)
        super()._apply(fn, recurse)
        for name, tensor in tables.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self


class ModulateArgument:
    """Forward pre-hook of a block: exchanges one of its arguments for what its Modulation makes of it."""

    def __init__(self, block: nn.Module, layout: ModulationLayout) -> None:
        """Raises ValueError where the block's forward has no such argument."""
        names = [name for name in inspect.signature(type(block).forward).parameters if name != "self"]
        if layout.argument not in names:
            raise ValueError(f"{type(block).__name__}.forward has no argument {layout.argument}, it takes {names}")
        self.argument, self.position, self.leaf = layout.argument, names.index(layout.argument), layout.leaf

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = self.argument in kwargs
        y = kwargs[self.argument] if named else args[self.position] if self.position < len(args) else None
        if y is None:
            raise ValueError(f"{type(block).__name__} was called without {self.argument}, which its layers count on")
        changed = getattr(block, self.leaf)(y)
        if named:
            return args, {**kwargs, self.argument: changed}
        return (*args[: self.position], changed, *args[self.position + 1 :]), kwargs


def attach(block: nn.Module, modulation: Modulation) -> RemovableHandle:
    """Let the block's argument pass through the modulation, which becomes a submodule of the block.

    Raises ValueError where the block has something of that name, as another modulation of the argument, already.
    """
    hook = ModulateArgument(block, modulation.layout)
    if hasattr(block, modulation.layout.leaf):
        raise ValueError(f"{type(block).__name__} has a {modulation.layout.leaf} already")
    block.add_module(modulation.layout.leaf, modulation)
    return block.register_forward_pre_hook(hook, with_kwargs=True)


def detach(block: nn.Module) -> None:
    """Undo every `attach`."""
    for key, hook in list(block._forward_pre_hooks.items()):
        if isinstance(hook, ModulateArgument):
            del block._forward_pre_hooks[key]
            block._forward_pre_hooks_with_kwargs.pop(key, None)
            delattr(block, hook.leaf)


def attach_all(model: nn.Module, modulations: Mapping[str, Modulation]) -> None:
    """modulations: by their own module names, `block.leaf`."""
    for name, modulation in modulations.items():
        attach(model.get_submodule(name.rpartition(".")[0]), modulation)
