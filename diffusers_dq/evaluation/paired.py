# SPDX-License-Identifier: Apache-2.0
"""`dq.compare`: a full-precision and a quantized pipeline side by side.

The quantized pipeline runs from the same seeds for the pictures and the latents. For the layers, its transformer also
gets every input of the reference's, so that a layer's error at a step does not hide in a trajectory that has drifted.
"""

import inspect
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_dq.denoise import Call, check_calls, denoiser, quiet, run_call, watching_timestep
from diffusers_dq.evaluation.comparison import Comparison
from diffusers_dq.evaluation.metrics import Array, optional, psnr, ratio_db, ssim
from diffusers_dq.linear import QuantizedLinear
from diffusers_dq.specs import spec_of

_MOST_ROWS = 4096  # of a linear's output in one forward; SNR over more tokens than that is the same number


def compare(
    reference: DiffusionPipeline,
    quantized: DiffusionPipeline,
    calls: Sequence[Call],
    *,
    num_inference_steps: int,
    seed: int = 0,
    layers: bool = True,
    progress: bool = True,
    component: str | None = None,
) -> Comparison:
    """Run both pipelines on `calls` from the same seeds and measure how far they are apart.

    calls: keyword arguments of `pipe(...)`, one dict a call; both run call i under a CPU generator of seed + i. All
        must give pictures of one size.
    layers: also the SNR of each quantized linear's output at each step (Comparison.layer_snr). This runs the quantized
        transformer twice as often, and needs both on one device in one dtype. Linears that carry a fold for a layer
        downstream emit something else on purpose, so those that may are left out (Comparison.left_out).
    component: "transformer" or "transformer_2" of pipelines that have both (Wan 2.2): whose latents and layers.

    Memory besides the pipelines: the latents of one call in RAM; with `layers`, up to 4096 tokens of each linear's
    output in one forward. Hooks are removed at the end, also after an exception or Ctrl-C.

    Raises ValueError for pipelines of different classes, one transformer given twice, pipelines whose schedulers take
    different timesteps, calls that bring their own generator; TypeError for arguments that the pipeline does not take;
    ImportError without torchmetrics.
    """
    model, twin = _checked(reference, quantized, calls, num_inference_steps, layers, component)
    optional("torchmetrics.functional.image")  # now, rather than after a run
    latents = _Latents()
    errors = _LayerErrors(model, twin) if layers else None
    results: list[tuple[Array, Array, Array, Array]] = []  # pictures of both, PSNR, SSIM

    bar = tqdm(total=2 * len(calls) * num_inference_steps, desc="compare", unit="step", disable=not progress)
    with bar, quiet(reference), quiet(quantized), torch.no_grad():
        for i, call in enumerate(calls):
            following = errors.attached(lambda: latents.step) if errors else nullcontext()
            with _one_run(bar, num_inference_steps) as advance, _watching(model, latents.hold, advance), following:
                x = _run(reference, call, num_inference_steps, seed + i)
            with _one_run(bar, num_inference_steps) as advance, _watching(twin, latents.compare, advance):
                y = _run(quantized, call, num_inference_steps, seed + i)
            latents.finish_call()
            if results and x.shape[1:] != results[0][0].shape[1:]:
                sizes = f"{x.shape[1:]}, calls[0] of {results[0][0].shape[1:]}"
                raise ValueError(f"calls[{i}] gives pictures of {sizes}; compare needs one size")
            results.append((x, y, psnr(x, y), ssim(x, y)))

    images_reference, images_quantized, psnrs, ssims = (np.concatenate(parts) for parts in zip(*results, strict=True))
    steps = len(latents.timesteps)
    return Comparison(
        images_reference=images_reference,
        images_quantized=images_quantized,
        psnr=psnrs,
        ssim=ssims,
        timesteps=np.array(latents.timesteps),
        latent_snr=latents.energies.snr("latents", steps),
        layer_snr=errors.snr(steps) if errors else {},
        left_out=errors.left_out if errors else {},
    )


def _checked(
    reference: DiffusionPipeline,
    quantized: DiffusionPipeline,
    calls: Sequence[Call],
    steps: int,
    layers: bool,
    component: str | None,
) -> tuple[ModelMixin, ModelMixin]:
    """The denoisers of both."""
    for pipe in (reference, quantized):
        if not isinstance(pipe, DiffusionPipeline):
            raise ValueError(f"compare needs two pipelines, got {type(pipe).__name__}")
    if type(reference) is not type(quantized):
        raise ValueError(
            f"the pipelines are of different classes: {type(reference).__name__} and {type(quantized).__name__}"
        )
    a, b = denoiser(reference, component), denoiser(quantized, component)
    if a is b:
        raise ValueError(
            "both pipelines hold the very same transformer (quantize works in place); load the full-precision pipeline"
            " once more with from_pretrained"
        )
    check_calls(reference, calls)
    for i, call in enumerate(calls):
        if "generator" in call:
            raise ValueError(f"calls[{i}] sets generator, which the first pipeline would use up; pass seed to compare")
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
    if layers and (a.device, a.dtype) != (b.device, b.dtype):
        raise ValueError(
            "to compare layers both transformers must get the same input, but the reference is"
            f" {a.dtype} on {a.device} and the quantized one {b.dtype} on {b.device}; move one, or pass layers=False"
        )
    return a, b


def _run(pipe: DiffusionPipeline, call: Call, num_inference_steps: int, seed: int) -> Array:
    """The pictures of one call, [B, H, W, C] in [0, 1]."""
    call = {key: value for key, value in call.items() if key != "output_type"}
    return _pictures(run_call(pipe, call, num_inference_steps=num_inference_steps, seed=seed, output_type="np"))


def _pictures(output: Any) -> Array:
    """[B, H, W, C] in [0, 1], from an array of pictures or videos or from a list of PIL pictures or of lists of them.

    Of a video the first frame.
    """
    if isinstance(output, list):
        firsts = [item[0] if isinstance(item, list) else item for item in output]
        output = np.stack([np.asarray(image) for image in firsts])
    images: Array = output[:, 0] if output.ndim == 5 else output
    return images / np.float32(255) if images.dtype == np.uint8 else images


@contextmanager
def _one_run(bar: Any, steps: int) -> Iterator[Callable[[], None]]:
    """A run's share of the bar: full at its end, whatever number of timesteps its scheduler made of the steps."""
    end = bar.n + steps
    yield lambda: bar.update(min(1, end - bar.n))
    bar.update(end - bar.n)


@contextmanager
def _watching(
    model: nn.Module, on_forward: Callable[[float, Tensor], None], advance: Callable[[], None]
) -> Iterator[None]:
    """Call `on_forward(timestep, first input)` before each forward, `advance()` when the timestep is a new one."""
    first = next(name for name in inspect.signature(type(model).forward).parameters if name != "self")
    current = [float("nan")]

    def on_timestep(timestep: float) -> None:
        if timestep != current[0]:
            current[0] = timestep
            advance()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs[first]
        on_forward(current[0], torch.cat([part.flatten() for part in value]) if isinstance(value, list) else value)

    with watching_timestep(model, on_timestep):  # its hook comes first
        handle = model.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class _Energies:
    """Sums of squares of signal and noise, for a name and a step: all that is kept of what streams through."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def add(self, name: str, step: int, reference: Tensor, other: Tensor) -> None:
        dtype = torch.promote_types(reference.dtype, torch.float32)
        x, y = reference.to(dtype), other.to(dtype)
        energy = torch.stack([x.square().sum(), (y - x).square().sum()])  # stays on its device: no synchronisation
        self.sums[name][step] = self.sums[name].get(step, 0) + energy

    def snr(self, name: str, steps: int) -> Array:
        """[S] dB; NaN where nothing was added."""
        sums = self.sums[name]
        return np.array([ratio_db(*sums[step].tolist()) if step in sums else np.nan for step in range(steps)])


class _Latents:
    """The transformer's inputs along both trajectories. Steps are told apart by timestep value."""

    def __init__(self) -> None:
        self.timesteps: list[float] = []
        self.step = 0
        self.energies = _Energies()
        self._held: deque[tuple[float, Tensor]] = deque()

    def hold(self, timestep: float, latents: Tensor) -> None:
        """Of the reference."""
        if timestep not in self.timesteps:
            self.timesteps.append(timestep)
        self.step = self.timesteps.index(timestep)
        self._held.append((timestep, latents.to("cpu", copy=True)))

    def compare(self, timestep: float, latents: Tensor) -> None:
        """Of the quantized pipeline, in the same order."""
        expected, reference = self._held.popleft() if self._held else (None, latents)
        if timestep != expected:
            raise ValueError(
                f"the quantized pipeline is at timestep {timestep} where the reference is at {expected}; give both the"
                " same scheduler"
            )
        self.energies.add("latents", self.timesteps.index(timestep), reference, latents.cpu())

    def finish_call(self) -> None:
        if self._held:
            raise ValueError(f"the reference took {len(self._held)} more steps than the quantized pipeline")


class _LayerErrors:
    """Gives the quantized transformer every input of the reference's and compares what their linears emit."""

    def __init__(self, reference: nn.Module, quantized: nn.Module) -> None:
        self.reference, self.quantized = reference, quantized
        folded = spec_of(reference).producers
        names = [name for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)]
        self.names = [name for name in names if name not in folded]
        self._carriers = [name for name in names if name in folded]
        self._energies = _Energies()
        self._held: dict[str, deque[Tensor]] = defaultdict(deque)

    @contextmanager
    def attached(self, step: Callable[[], int]) -> Iterator[None]:
        """While the reference pipeline runs.   step: the index of the step it is at."""
        with ExitStack() as stack:
            for name in self.names:
                hold, compare = self._hold(name), self._compare(name, step)
                stack.callback(self.reference.get_submodule(name).register_forward_hook(hold).remove)
                stack.callback(self.quantized.get_submodule(name).register_forward_hook(compare).remove)
            stack.callback(self.reference.register_forward_hook(self._follow, with_kwargs=True).remove)
            stack.callback(self._held.clear)
            yield

    def _hold(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: self._held[name].append(_rows(output))

    def _compare(self, name: str, step: Callable[[], int]) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._held[name]:  # empty for repeated calls of a module that quantization tied to its copies
                self._energies.add(name, step(), self._held[name].popleft(), _rows(output))

        return hook

    def _follow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.quantized(*args, **kwargs)
        self._held.clear()

    def snr(self, steps: int) -> dict[str, Array]:
        return {name: self._energies.snr(name, steps) for name in self.names if name in self._energies.sums}

    @property
    def left_out(self) -> dict[str, str]:
        carriers = dict.fromkeys(self._carriers, "its output may carry a fold for a linear downstream")
        missed = [name for name in self.names if name not in self._energies.sums]
        return carriers | dict.fromkeys(missed, "never reached")


def _rows(output: Tensor) -> Tensor:
    """[R, K]: at most 4096 tokens of an output [..., K], evenly spread."""
    rows = output.flatten(0, -2)
    if len(rows) <= _MOST_ROWS:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, _MOST_ROWS, device=rows.device, dtype=torch.float64).long()]
