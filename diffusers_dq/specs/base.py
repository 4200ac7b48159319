# SPDX-License-Identifier: Apache-2.0
"""Who feeds whom in a transformer, and what upstream can carry a change of basis."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from diffusers_dq.registry import Registry
from diffusers_dq.transforms import Chain, Scale, Shift


@dataclass(frozen=True)
class ModulationArgument:
    """The modulation that a block is called with, made once for all blocks (adaLN-single and its like).

    block: module name.   argument: of the block's forward, [..., n C], or [..., n, C] for `chunks` n.
    table: the block's own parameter whose first n C values it adds to the argument; None where it adds none.
    axis: of the argument, where the n chunks lie if they have an axis of their own.
    """

    block: str
    argument: str
    chunks: int
    table: str | None = None
    axis: int = -2


Source: TypeAlias = "str | ModulationArgument"  # a linear by its name, or what a block is called with


@dataclass(frozen=True)
class RowUpdate:
    """Entries [start, stop) of what the source emits become `multiplier y + offset_g`.

    multiplier: [stop - start];   offset: [G, stop - start].
    """

    source: Source
    start: int
    stop: int
    multiplier: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Producer:
    """What puts out the group's input, by way of operations that keep channels apart: a linear, or a modulation."""

    source: Source

    def can_carry(self, chain: Chain) -> bool:
        return all(isinstance(transform, Shift | Scale) for transform in chain.transforms)

    def updates(self, chain: Chain, channels: int) -> list[RowUpdate]:
        """What makes the producer emit u = T_g(x) instead of x."""
        raise NotImplementedError


@dataclass(frozen=True)
class ModulatedNorm(Producer):
    """x = N(h) (1 + scale) + shift, with shift and scale two chunks of the source's output, K entries each.

    chunks: (shift, scale) by number; None where the block has no such part. Several pairs where a group reads what
        several norms put out one after the other.
    u = m x + a_g = N(h) (1 + scale') + shift' with scale' = m scale + (m - 1) and shift' = m shift + a_g, so the
    block's own `1 + scale` stays as it is (methods.md 0.1a; HTG Eq. 11 keeps 1/s as an extra vector instead). N may
    have weights of its own.
    """

    chunks: tuple[tuple[int | None, int | None], ...] = ((0, 1),)

    def can_carry(self, chain: Chain) -> bool:
        """Without a shift only scales, without a scale only shifts."""
        multiplies, adds = (any(isinstance(t, kind) for t in chain.transforms) for kind in (Scale, Shift))
        lacks_shift, lacks_scale = (any(pair[i] is None for pair in self.chunks) for i in (0, 1))
        return super().can_carry(chain) and not (adds and lacks_shift) and not (multiplies and lacks_scale)

    def updates(self, chain: Chain, channels: int) -> list[RowUpdate]:
        multiplier, offset = chain.as_affine(channels)
        found = []
        for shift, scale in self.chunks:
            for chunk, change in ((shift, offset), (scale, (multiplier - 1)[None])):
                if chunk is not None:
                    start = chunk * channels
                    found.append(RowUpdate(self.source, start, start + channels, multiplier, change))
        return found


@dataclass(frozen=True)
class ValueProjection(Producer):
    """x = A v with the rows of A summing to one, so A (m v + a_g) = m x + a_g: fold into v (methods.md 0.1b).

    With quantized softmax probabilities the rows no longer sum to one; then nothing is carried.
    """

    def updates(self, chain: Chain, channels: int) -> list[RowUpdate]:
        multiplier, offset = chain.as_affine(channels)
        return [RowUpdate(self.source, 0, channels, multiplier, offset)]


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


@dataclass(frozen=True)
class TimestepRange:
    """How the model is told the step. argument: of its forward.

    noisiest, cleanest: what pipelines pass at the two ends of a schedule, in the model's own units; where noise grows
        with the number (most) noisiest > cleanest.
    per_token: whether some pipelines pass one a frame or token (image to video): then the noisiest decides.
    """

    argument: str = "timestep"
    noisiest: float = 1000
    cleanest: float = 0
    per_token: bool = False

    @property
    def descending(self) -> bool:
        """Whether denoising goes from larger to smaller numbers."""
        return self.noisiest > self.cleanest


@dataclass(frozen=True)
class TextProjections:
    """linears: whose input depends on these `arguments` of the model's forward alone, not on the timestep."""

    linears: tuple[str, ...]
    arguments: tuple[str, ...] = ("encoder_hidden_states",)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What an architecture looks like to a quantizer.

    groups: every linear that may be quantized is in one of them.   attention: empty where QK^T and AV cannot be.
    not_converted: parts of names of linears that stay in full precision unless the user says otherwise; a part that is
        a linear's whole name means that linear alone (Flux: `proj_out`, not `single_transformer_blocks.0.proj_out`).
    weight_only: linears that run once a step on a batch of vectors: their input is never rounded.
    timestep: how the model is told the step; None where nothing is known.
    text: keys and values of cross-attention that are the same at every step of a prompt; None where there are none.
    duplicates: (copy, original) modules that checkpoints of this architecture store many times with the same content.
    """

    groups: tuple[LinearGroup, ...]
    attention: tuple[AttentionSite, ...] = ()
    not_converted: tuple[str, ...] = ()
    weight_only: frozenset[str] = frozenset()
    duplicates: tuple[tuple[str, str], ...] = ()
    timestep: TimestepRange | None = None
    text: TextProjections | None = None

    @property
    def producers(self) -> set[str]:
        """Linears that may put out something else than before, because what reads it is changed to suit."""
        sources = (group.producer.source for group in self.groups if group.producer)
        return {source for source in sources if isinstance(source, str)}


SPECS: Registry[Callable[[nn.Module], ModelSpec]] = Registry("model spec")

# Parts of names that embedders and modulation linears inside blocks go by across diffusers' transformers.
_CONDITIONING = ("emb", "time", "norm", "adaln", "adaLN", "modulation", "_mod.")


def spec_of(model: nn.Module) -> ModelSpec:
    """The registered spec of the model's class, else each linear on its own with nothing folded."""
    build = SPECS.get(type(model).__name__)
    if build is not None:
        return build(model)
    return undescribed(model, ((name,) for name, module in model.named_modules() if isinstance(module, nn.Linear)))


def undescribed(model: nn.Module, groups: Iterable[tuple[str, ...]]) -> ModelSpec:
    """Of an architecture without a spec: groups of linears that share an input, as far as they are inside repeated
    blocks. What is outside, embedders, first and last layers, stays in full precision, and so does what is more than
    an nn.Linear: a subclass may compute something else, or be there for its weight alone (nn.MultiheadAttention)."""
    blocks = tuple(f"{block}." for block in _repeated_blocks(model))
    plain = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    inside = (tuple(name for name in group if name in plain and name.startswith(blocks)) for group in groups)
    return ModelSpec(groups=tuple(LinearGroup(group) for group in inside if group), not_converted=_CONDITIONING)


def _repeated_blocks(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the outermost numbered members of lists and dicts of modules that hold more than one linear: not the
    parts of a feed-forward, nor projections of which there is one for each block."""
    for name, child in module.named_children():
        linears = sum(isinstance(part, nn.Linear) for part in child.modules())
        if name.isdigit() and isinstance(module, nn.ModuleList | nn.ModuleDict) and linears > 1:
            yield f"{prefix}{name}"
        else:
            yield from _repeated_blocks(child, f"{prefix}{name}.")
