# SPDX-License-Identifier: Apache-2.0
"""Who feeds whom in a transformer, and what upstream can carry a change of basis."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from diffusers_dq.registry import Registry
from diffusers_dq.transforms import Chain, Scale, Shift


@dataclass(frozen=True)
class RowUpdate:
    """Rows [start, stop) of a linear's output become `multiplier y + offset_g`.

    multiplier: [stop - start];   offset: [G, stop - start].
    """

    linear: str
    start: int
    stop: int
    multiplier: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Producer:
    """The linear whose output, by way of operations that keep channels apart, is the group's input."""

    linear: str
    carries: tuple[type, ...] = (Shift, Scale)

    def can_carry(self, chain: Chain) -> bool:
        return all(isinstance(transform, self.carries) for transform in chain.transforms)

    def updates(self, chain: Chain, channels: int) -> list[RowUpdate]:
        """What makes the producer emit u = T_g(x) instead of x."""
        raise NotImplementedError


@dataclass(frozen=True)
class ModulatedNorm(Producer):
    """x = LN(h) (1 + scale) + shift, with shift and scale two chunks of `linear`'s output, K rows each.

    u = m x + a_g = LN(h) (1 + scale') + shift' with scale' = m scale + (m - 1) and shift' = m shift + a_g, so the
    block's own `1 + scale` stays as it is (methods.md 0.1a; HTG Eq. 11 keeps 1/s as an extra vector instead).
    """

    shift_chunk: int = 0
    scale_chunk: int = 1

    def updates(self, chain: Chain, channels: int) -> list[RowUpdate]:
        multiplier, offset = chain.as_affine(channels)
        shift, scale = self.shift_chunk * channels, self.scale_chunk * channels
        return [
            RowUpdate(self.linear, shift, shift + channels, multiplier, offset),
            RowUpdate(self.linear, scale, scale + channels, multiplier, (multiplier - 1)[None]),
        ]


@dataclass(frozen=True)
class ValueProjection(Producer):
    """x = A v with the rows of A summing to one, so A (m v + a_g) = m x + a_g: fold into v (methods.md 0.1b).

    With quantized softmax probabilities the rows no longer sum to one; then nothing is carried.
    """

    def updates(self, chain: Chain, channels: int) -> list[RowUpdate]:
        multiplier, offset = chain.as_affine(channels)
        return [RowUpdate(self.linear, 0, channels, multiplier, offset)]


@dataclass(frozen=True)
class LinearGroup:
    """A site: the linears that read one activation, and what produced it (None: nothing that can carry a fold)."""

    linears: tuple[str, ...]
    producer: Producer | None = None

    @property
    def name(self) -> str:
        return self.linears[0]


@dataclass(frozen=True)
class AttentionSite:
    """A self-attention module and the linears whose outputs are its query, key and value, as they are."""

    module: str
    query: str
    key: str
    value: str

    @property
    def operands(self) -> tuple[str, str, str, str]:
        """Names of the statistics of query, key, value and probabilities."""
        return f"{self.query}:output", f"{self.key}:output", f"{self.value}:output", f"{self.module}:probabilities"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What an architecture looks like to a quantizer.

    groups: every linear that may be quantized is in one of them.   attention: empty where QK^T and AV cannot be.
    not_converted: parts of module names that stay in full precision unless the user says otherwise.
    weight_only: linears that run once a step on a batch of vectors: their input is never rounded.
    duplicates: (copy, original) modules that checkpoints of this architecture store many times with the same content.
    """

    groups: tuple[LinearGroup, ...]
    attention: tuple[AttentionSite, ...] = ()
    not_converted: tuple[str, ...] = ()
    weight_only: frozenset[str] = frozenset()
    duplicates: tuple[tuple[str, str], ...] = ()

    @property
    def producers(self) -> set[str]:
        return {group.producer.linear for group in self.groups if group.producer}


SPECS: Registry[Callable[[nn.Module], ModelSpec]] = Registry("model spec")

# Parts of names that embedders and modulation linears inside blocks go by across diffusers' transformers.
_CONDITIONING = ("emb", "time", "norm", "adaln", "modulation")


def spec_of(model: nn.Module) -> ModelSpec:
    """The registered spec of the model's class, else each linear on its own with nothing folded."""
    build = SPECS.get(type(model).__name__)
    if build is not None:
        return build(model)
    return undescribed((name,) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def undescribed(groups: Iterable[tuple[str, ...]]) -> ModelSpec:
    """Of an architecture without a spec: groups of linears that share an input, as far as they are inside repeated
    blocks, whose names hold a number. What is outside, embedders, first and last layers, stays in full precision."""
    inside = (tuple(name for name in group if any(map(str.isdigit, name.split(".")))) for group in groups)
    return ModelSpec(groups=tuple(LinearGroup(group) for group in inside if group), not_converted=_CONDITIONING)
