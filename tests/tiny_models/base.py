# SPDX-License-Identifier: Apache-2.0
"""A tiny model as data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class TinyModel:
    """cls: name that the library exports.   settings: arguments of its constructor.
    inputs: (timestep in the model's own units, generator) -> arguments of forward in fp32, the same for one seed.
    timesteps: three, the noisiest first, as pipelines would pass them.   variant: tells apart several of a class.
    unset: endings of the names of parameters that the constructor leaves as memory was.
    """

    cls: str
    settings: Mapping[str, Any]
    inputs: Callable[[float, torch.Generator], Inputs]
    timesteps: tuple[float, float, float] = (951.0, 499.0, 21.0)
    variant: str = ""
    library: Any = diffusers
    unset: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.cls}{f'-{self.variant}' if self.variant else ''}"

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """In evaluation mode; parameters that begin as zeros or ones (tables, gates, norms) are random too."""
        torch.manual_seed(0)
        model = getattr(self.library, self.cls)(**self.settings).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(self.unset):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
                elif parameter.min() == parameter.max():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.to(dtype)

    @torch.no_grad()
    def run(self, model: Any, timestep: float | None = None) -> Tensor:
        """What the model predicts at a timestep, by default the middle one; lists of samples are stacked."""
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        inputs = self.inputs(self.timesteps[1] if timestep is None else timestep, torch.Generator().manual_seed(2))
        output = model(**{name: cast(value, dtype) for name, value in inputs.items()}, return_dict=False)[0]
        return torch.stack(list(output)) if isinstance(output, list | tuple) else output


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors, also in lists, as this dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(cast(part, dtype) for part in value)
    return value


MODELS: dict[str, TinyModel] = {}


def add(model: TinyModel) -> TinyModel:
    assert model.name not in MODELS, model.name
    MODELS[model.name] = model
    return model
