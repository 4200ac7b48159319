# SPDX-License-Identifier: Apache-2.0
"""Learns how weights are rounded, a unit of the model at a time, so that its output on real inputs stays.

As in BRECQ (Li et al., ICLR 2021) and Q-Diffusion (Li et al., ICCV 2023): a unit gets what the units before it put out
once they are quantized, and is to put out what it would have in full precision. Both come from running the model on
the samples that calibration kept, up to the unit: of activations memory holds one unit's inputs and outputs at a time,
besides the quantized weights so far.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_dq.adaround import SoftLinear, annealed, cosine
from diffusers_dq.affine import QuantizedWeight
from diffusers_dq.building import folded, low_rank_of
from diffusers_dq.files import OfAnotherRun, check_writable, read_tensors, write_tensors
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.model_inputs import moved
from diffusers_dq.planning import LinearPlan, Plan
from diffusers_dq.recipe import Reconstruction
from diffusers_dq.replay import Replay, run_up_to, swapped, tensors_in, units_of
from diffusers_dq.timesteps import group_of

Build = Callable[[str, nn.Linear, LinearPlan], QuantizedLinear]


@dataclass(frozen=True)
class Passage:
    """What went through a unit in one forward.   output: the tensors that came out."""

    timestep: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: tuple[Tensor, ...]


class Reconstructor:
    """One model's reconstruction. The model is as it was whenever no method of this class is running."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        build: Build,
        modulations_of: Callable[[str], Mapping[str, nn.Module]],
        replay: Replay,
        settings: Reconstruction,
        *,
        identity: Mapping[str, Any],
        checkpoint: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        """modulations_of: those that go with a unit's layers, of blocks in it or of the block that it is in.
        identity: JSON-able, by which a checkpoint is known to be of this run.
        """
        self.model, self.plan, self.build, self.replay, self.settings = model, plan, build, replay, settings
        self.modulations_of = modulations_of
        self.identity = dict(identity) | {"reconstruction": asdict(settings)}
        self.checkpoint = None if checkpoint is None else check_writable(checkpoint)
        self.seed = seed
        self.linears = dict(plan.linears)

    def run(self, progress: bool) -> Plan:
        """The plan with every weight decided."""
        units = units_of(self.model, self._rounded(), self.settings.unit, self.plan.apart)
        done = self._resume()
        layers: dict[str, nn.Module] = {}
        bar = tqdm(total=len(units) * self.settings.iterations, desc="reconstruct", unit="it", disable=not progress)
        with bar:
            for unit, names in units.items():
                if not done.issuperset(names):
                    self._learn(unit, names, layers, bar)
                    done.update(names)
                    self._save(done)
                else:
                    bar.update(self.settings.iterations)
                layers |= {name: self._layer(name, self.linears[name]) for name in names}
                layers |= self.modulations_of(unit)
        return replace(self.plan, linears=self.linears)

    def _rounded(self) -> list[str]:
        return [name for name, plan in self.plan.linears.items() if plan.weight_scheme is not None]

    def _layer(self, name: str, plan: LinearPlan) -> QuantizedLinear:
        linear = self.model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return self.build(name, linear, plan)

    def _learn(self, unit: str, names: Sequence[str], layers: Mapping[str, nn.Module], bar: Any) -> None:
        modulations = self.modulations_of(unit)
        around = {name: m for name, m in modulations.items() if unit.startswith(f"{name.rpartition('.')[0]}.")}
        exact = self._passages(unit, {})
        quantized = self._passages(unit, {**layers, **around})
        passages = [replace(q, output=self._wanted(unit, e)) for q, e in zip(quantized, exact, strict=True)]
        soft = {name: self._soft(name) for name in names}
        nearest = {name: layer.layer for name, layer in soft.items()}
        with swapped(self.model, {**nearest, **modulations}):
            before = self._error(unit, passages)
        with swapped(self.model, {**soft, **modulations}):
            self._optimize(unit, soft, passages, before, bar)
        learned = {name: _learned(self.linears[name], layer) for name, layer in soft.items()}
        rounded = {name: self._layer(name, _uncorrected(plan)) for name, plan in learned.items()}
        with swapped(self.model, {**rounded, **modulations}):
            after = self._error(unit, passages)
        bar.set_postfix_str(f"{unit}: error {before:.3g} -> {min(before, after):.3g}")
        kept = {name: replace(self.linears[name], decided=layer.nearest()) for name, layer in soft.items()}
        self.linears |= learned if after < before else kept
        for name in (name for name, layer in soft.items() if not layer.reached):
            note = "rounded to nearest: the model runs it without gradients, or not at all, so nothing was learned"
            self.linears[name] = kept[name].noted(note)

    def _wanted(self, unit: str, exact: Passage) -> tuple[Tensor, ...]:
        """What the unit is to put out: as in full precision; of a linear, with what others ask it to carry."""
        plan = self.linears.get(unit)
        if plan is None or not plan.rows:
            return exact.output
        output = exact.output[0].clone()
        noisiest = self.replay.noisiest(exact.timestep)[None]
        for update, boundaries in plan.rows:
            rows = slice(update.start, update.stop)
            offset = update.offset[int(group_of(noisiest, boundaries))] if len(update.offset) > 1 else update.offset[0]
            output[..., rows] = output[..., rows] * update.multiplier.to(output) + offset.to(output)
        return (output,)

    def _soft(self, name: str) -> SoftLinear:
        plan = _uncorrected(self.linears[name])
        linear = self.model.get_submodule(name)
        assert isinstance(linear, nn.Linear) and plan.weight_scheme is not None
        exact, _ = folded(linear, plan)
        factors = low_rank_of(exact, plan)
        if factors is not None:
            exact = exact - factors[1] @ factors[0]
        return SoftLinear(self._layer(name, plan), exact, plan.weight_scheme, plan.scheme)

    @torch.no_grad()
    def _passages(self, unit: str, layers: Mapping[str, nn.Module]) -> list[Passage]:
        """What reaches the unit, and leaves it, when the model runs on each sample with `layers` in place."""
        found = []
        with swapped(self.model, layers):
            for timestep, sample in self.replay.inputs():
                args, kwargs, output = run_up_to(self.model, unit, sample)
                found.append(Passage(timestep, *moved((args, kwargs, output), "cpu")))
        return found

    def _outputs(self, unit: str, passage: Passage) -> tuple[Tensor, ...]:
        self.replay.select(passage.timestep)
        args, kwargs = moved((passage.args, passage.kwargs), self.replay.device)
        return tensors_in(self.model.get_submodule(unit)(*args, **kwargs))

    @torch.no_grad()
    def _error(self, unit: str, passages: Sequence[Passage]) -> float:
        errors = [float(_loss(self._outputs(unit, passage), passage.output)) for passage in passages]
        return sum(errors) / len(errors)

    @torch.enable_grad()
    def _optimize(
        self, unit: str, soft: Mapping[str, SoftLinear], passages: Sequence[Passage], before: float, bar: Any
    ) -> None:
        """Minimise error / before + rounding_weight * mean undecided: both in units that no model's scale changes."""
        settings = self.settings
        scales = [layer.log_input_scale for layer in soft.values() if layer.layer.layout.static]
        weights = [layer.v for layer in soft.values()]
        groups = [{"params": weights, "lr": settings.learning_rate}]
        if scales:
            groups.append({"params": scales, "lr": settings.input_learning_rate})
        optimizer = torch.optim.Adam(groups)
        order = torch.Generator().manual_seed(self.seed)
        error = max(before, torch.finfo(torch.float32).tiny)
        pressure = settings.rounding_weight / sum(v.numel() for v in weights)
        for step in range(settings.iterations):
            passage = passages[int(torch.randint(len(passages), (), generator=order))]
            loss = _loss(self._outputs(unit, passage), passage.output) / error
            beta = annealed(step, settings.iterations, settings.warmup, settings.beta_start, settings.beta_end)
            if beta is not None:
                loss = loss + pressure * sum(layer.undecided(beta) for layer in soft.values())
            if scales:
                groups[1]["lr"] = settings.input_learning_rate * cosine(step, settings.iterations)
            optimizer.zero_grad()
            loss.backward(inputs=weights + scales)
            optimizer.step()
            bar.update()

    def _save(self, done: set[str]) -> None:
        if self.checkpoint is None:
            return
        tensors: dict[str, Tensor] = {}
        for name in done:
            plan = self.linears[name]
            assert plan.decided is not None
            parts = plan.decided._asdict()
            if plan.input_range is not None:
                parts["input_scale"] = plan.input_range.scale
            tensors |= {f"{name}/{key}": part for key, part in parts.items() if part is not None}
        write_tensors(self.checkpoint, tensors, self.identity)

    def _resume(self) -> set[str]:
        """Linears decided by an earlier run, which are put into the plan. Raises ValueError for another run's file."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return set()
        identity, tensors = _read(self.checkpoint)
        mine = json.loads(json.dumps(self.identity))
        differing = [key for key in mine.keys() | identity.keys() if mine.get(key) != identity.get(key)]
        if differing:
            raise OfAnotherRun(
                f"the checkpoint {self.checkpoint} is of another run: {', '.join(sorted(differing))} differ. Quantize"
                " with the same arguments to resume, or give another checkpoint path to start anew"
            )
        done = {key.rpartition("/")[0] for key in tensors}
        for name in done:
            self._decide(
                name, {key: tensors.get(f"{name}/{key}") for key in (*QuantizedWeight._fields, "input_scale")}
            )
        return done

    def _decide(self, name: str, parts: dict[str, Tensor | None]) -> None:
        """Put what a checkpoint holds of a linear into the plan. Raises ValueError where it does not fit there."""
        plan, input_scale = self.linears.get(name), parts.pop("input_scale")
        found = None if plan is None else plan.input_range
        fits = plan is not None and _fits(self.model.get_submodule(name), **parts)
        if not fits or (found is not None and (input_scale is None or input_scale.shape != found.scale.shape)):
            raise ValueError(
                f"the checkpoint {self.checkpoint} is damaged: what it holds of {name} does not fit the model; delete"
                " it to start anew"
            )
        assert plan is not None
        if found is not None and input_scale is not None:
            found = replace(found, scale=input_scale)
        decided = QuantizedWeight(**moved(parts, self.replay.device))
        self.linears[name] = replace(plan, decided=decided, input_range=found)


def _fits(linear: Any, integers: Tensor | None, scale: Tensor | None, zero_point: Tensor | None) -> bool:
    """Whether they are a QuantizedWeight of the linear, in shapes and dtypes, and its scales are numbers."""
    if integers is None or scale is None or scale.ndim not in (1, 2) or len(scale) != len(linear.weight):
        return False
    return (
        (integers.dtype, integers.shape) == (torch.int8, linear.weight.shape)
        and scale.is_floating_point()
        and bool(torch.isfinite(scale).all())
        and (scale.ndim == 1 or linear.in_features % max(1, scale.shape[1]) == 0)
        and (zero_point is None or (zero_point.dtype, zero_point.shape) == (torch.int8, scale.shape))
    )


def _loss(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean over tokens of the squared error summed over channels (BRECQ's, p = 2)."""
    errors = [(y.float() - target.to(y.device).float()) for y, target in zip(outputs, targets, strict=True)]
    return torch.stack([error.square().sum(-1).mean() for error in errors]).sum()


def _uncorrected(plan: LinearPlan) -> LinearPlan:
    """Learned rounding makes up for the systematic error itself; the bias is corrected once it is decided."""
    return replace(plan, recipe=replace(plan.recipe, output_correction=False))


def _learned(plan: LinearPlan, soft: SoftLinear) -> LinearPlan:
    found = plan.input_range
    if found is not None:
        found = replace(found, scale=found.scale * soft.log_input_scale.detach().exp().to(found.scale.device))
    return replace(plan, decided=soft.decided(), input_range=found)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        identity, tensors = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"the checkpoint {error}; delete it to start anew") from error
    if not isinstance(identity, dict):
        raise ValueError(f"{path} is no checkpoint of a reconstruction; give another path")
    return identity, tensors
