# SPDX-License-Identifier: Apache-2.0
"""Runs a pipeline as its user will and observes every linear's input at every denoising step."""

import inspect
import logging
import os
import weakref
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_dq.attention import sample_probabilities
from diffusers_dq.checks import check_argument
from diffusers_dq.denoise import Call, argument_names, check_calls, denoiser, quiet, run_call, watching_timestep
from diffusers_dq.files import OfAnotherRun, check_writable
from diffusers_dq.fingerprint import fingerprint_of
from diffusers_dq.model_inputs import ModelInput, capture, places
from diffusers_dq.observers import StepObserver
from diffusers_dq.replay import blocks_of
from diffusers_dq.specs import SPECS, AttentionSite, spec_of
from diffusers_dq.statistics import SiteStatistics, Statistics, not_finite

logger = logging.getLogger(__name__)


def calibrate(
    pipe: DiffusionPipeline,
    calls: Sequence[Call],
    *,
    num_inference_steps: int,
    seed: int = 0,
    second_moments: bool = False,
    samples: int = 32,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    component: str | None = None,
) -> Statistics:
    """Run the pipeline on `calls` and return per-step statistics of its transformer's activations.

    calls: keyword arguments of `pipe(...)`, one dict a call. Call i runs with a generator seeded `seed + i`, unless it
        brings its own, so a seed gives the same statistics again on the same machine.
    num_inference_steps: the steps S of each call. Inference may take another number, and another scheduler.
    second_moments: also sum x x^T over all tokens that a linear reads, for `DQConfig(rounding="gptq")`: 4 K^2 bytes
        for each such activation, 2.9 GB for DiT-XL/2.
    samples: denoising steps, evenly spread over schedule and calls, of which the transformer's whole input is kept
        (latents, embeddings), for reconstruction, searches and noise correction.
    checkpoint: a file written after each call. The same function call again resumes behind the last whole call there;
        it raises ValueError when the file belongs to another run.
    component: "transformer" or "transformer_2" of a pipeline that has both (Wan 2.2), of which one is calibrated.

    Memory: for each activation of K channels, 24 S K bytes of RAM (fp32 minimum and maximum, 8 tokens in bf16), and as
    much again while the result, or a checkpoint, is put together: 0.87 GB and 1.7 GB for DiT-XL/2 at 100 steps. It
    does not grow with batch, tokens, or calls of one schedule. Every hook is removed at the end, also after an
    exception or Ctrl-C.

    Raises ValueError for a pipeline without a transformer, for activations that are NaN or infinite (the message names
    module and step), TypeError for arguments that the pipeline does not take.
    """
    check_calls(pipe, calls)
    check_argument("num_inference_steps", num_inference_steps, int)
    check_argument("seed", seed, int)
    check_argument("second_moments", second_moments, bool)
    check_argument("samples", samples, int)
    if samples < 0:
        raise ValueError(f"samples must be at least 0, got {samples}")
    if checkpoint is not None:
        check_writable(checkpoint)
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    transformer = denoiser(pipe, component)
    if getattr(transformer, "is_quantized", False):
        raise ValueError("the transformer is quantized already; calibrate the full-precision model")
    adapted = next((name for name, module in transformer.named_modules() if hasattr(module, "get_base_layer")), None)
    if adapted is not None:
        raise ValueError(
            f"an adapter sits on {adapted}: statistics would belong neither to the model with it fused nor to the one"
            " without it. Fuse it (pipe.fuse_lora(), pipe.unload_lora_weights()) or unload it, then calibrate"
        )
    kept = places(samples, len(calls), num_inference_steps)
    recorder = _Recorder(transformer, seed, second_moments, kept)
    about = _about(pipe, transformer, calls, num_inference_steps, seed)
    about |= {"second_moments": second_moments, "samples": samples}
    done = recorder.resume(checkpoint, about) if checkpoint is not None else 0

    bar = tqdm(
        total=len(calls) * num_inference_steps,
        initial=done * num_inference_steps,
        desc="calibrate",
        unit="step",
        disable=not progress,
    )
    with bar, quiet(pipe), recorder.attached():
        for i in range(done, len(calls)):
            recorder.start_call(i)
            with _step_progress(pipe, transformer, calls[i], bar.update) as callback:
                run_call(
                    pipe,
                    {**calls[i], **callback},
                    num_inference_steps=num_inference_steps,
                    seed=seed + i,
                    output_type="latent",
                )
            recorder.check_finite()
            if checkpoint is not None:
                recorder.statistics(about | {"calls_done": i + 1}).save(checkpoint)
    if not recorder.timesteps:
        raise ValueError(
            f"{component or 'the transformer'} saw no step of these calls, so there is nothing to quantize it by: give"
            " more num_inference_steps, or calls that reach it (a boundary between two denoisers?)"
        )
    recorder.check_range()
    statistics = recorder.statistics(about | {"calls_done": len(calls)})
    quantizer = getattr(transformer, "hf_quantizer", None)
    if quantizer is not None:  # a model loaded as *prepared* remembers what `dq.quantize(pipe)` will need
        quantizer.statistics = statistics
    return statistics


def _about(
    pipe: DiffusionPipeline, transformer: nn.Module, calls: Sequence[Call], num_inference_steps: int, seed: int
) -> dict[str, Any]:
    return {
        "model_class": type(transformer).__name__,
        "pipeline_class": type(pipe).__name__,
        "scheduler": _scheduler(pipe),
        "num_inference_steps": num_inference_steps,
        "seed": seed,
        "calls": len(calls),
        "arguments": [{key: _brief(value) for key, value in sorted(call.items())} for call in calls],
        "dtype": str(next(transformer.parameters()).dtype),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def _scheduler(pipe: DiffusionPipeline) -> str:
    scheduler = getattr(pipe, "scheduler", None)
    config = getattr(scheduler, "config", {})
    settings = sorted((k, v) for k, v in config.items() if not k.startswith("_"))  # the rest is how it was made
    return f"{type(scheduler).__name__}({', '.join(f'{key}={_brief(value)}' for key, value in settings)})"


def _brief(value: Any) -> str:
    """A short description by which a call's argument is known again: what is long or an object, by a checksum."""
    if isinstance(value, Tensor):
        value = value.detach().float().cpu().numpy()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_brief, value))}]"
    if hasattr(value, "tobytes"):  # arrays and pictures
        return f"{type(value).__name__} {getattr(value, 'shape', '')} {zlib.crc32(value.tobytes()):08x}"
    text = repr(value)
    if " at 0x" in text:  # an object whose address says nothing
        return type(value).__name__
    return text if len(text) <= 200 else f"{type(value).__name__} {zlib.crc32(text.encode()):08x}"


@contextmanager
def _step_progress(
    pipe: DiffusionPipeline, transformer: nn.Module, call: Call, advance: Callable[[int], object]
) -> Iterator[dict[str, Any]]:
    """Advance once a step: by `callback_on_step_end` where the pipeline has it, else when the timestep changes."""
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        theirs = call.get("callback_on_step_end")

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            advance(1)
            return theirs(pipe, step, timestep, tensors) if theirs else tensors

        yield {"callback_on_step_end": callback}
        return

    last: list[float] = []

    def on_forward(timestep: float) -> None:
        if [timestep] != last:
            last[:] = [timestep]
            advance(1)

    with watching_timestep(transformer, on_forward):
        yield {}


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear is called with."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x


class _Recorder:
    """Owns the observers and every hook that feeds them."""

    def __init__(
        self, model: nn.Module, seed: int, second_moments: bool = False, kept: Collection[tuple[int, int]] = ()
    ) -> None:
        self.model = model
        self.seed = seed
        self.second_moments = second_moments
        self.kept = kept
        self.samples: list[ModelInput] = []
        self.timesteps: list[float] = []
        timestep = spec_of(model).timestep
        self.descending = timestep is None or timestep.descending  # all that is known of a schedule of one step
        self.observers: dict[str, StepObserver] = {}
        self.linears: dict[str, tuple[str, ...]] = {}
        self.call = 0
        self._step = 0
        self._visited: list[int] = []  # steps of this call so far
        self._site_of: dict[str, str] = {}  # linear -> site, as far as discovered
        self._seen: dict[tuple[int, int, str], tuple[weakref.ref[Tensor], list[str]]] = {}  # by the sites that read it

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(watching_timestep(self.model, self._on_forward, self.descending))
            stack.callback(self._register_sampling().remove)
            for handle in self._register_hooks():
                stack.callback(handle.remove)
            yield

    def _register_sampling(self) -> Any:
        """Runs after `_on_forward`."""
        names = argument_names(self.model)

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (self.call, self._visited.index(self._step)) in self.kept:
                self.samples.append(capture(names, args, kwargs))

        return self.model.register_forward_pre_hook(keep, with_kwargs=True)

    def _register_hooks(self) -> Iterator[Any]:
        if SPECS.get(type(self.model).__name__) is None:
            for name, module in self.model.named_modules():
                if isinstance(module, nn.Linear):
                    yield module.register_forward_pre_hook(self._discover(name), with_kwargs=True)
            return
        spec = spec_of(self.model)
        for group in spec.groups:
            self.linears[group.name] = group.linears
            first = self.model.get_submodule(group.name)
            yield first.register_forward_pre_hook(self._observe_input(group.name), with_kwargs=True)
        for site in spec.attention:
            for linear in (site.query, site.key, site.value):
                name = f"{linear}:output"
                self.linears[name] = ()
                yield self.model.get_submodule(linear).register_forward_hook(self._observe_output(name))
            yield from self._watch_probabilities(site)

    def _observe_input(self, site: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, kwargs: self._observe(site, _input_of(args, kwargs))

    def _observe_output(self, site: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, args, output: self._observe(site, output)

    def _watch_probabilities(self, site: AttentionSite) -> Iterator[Any]:
        """A few rows of softmax(q k^T), which no module puts out, worked out once q and k are there."""
        attention: Any = self.model.get_submodule(site.module)
        name = f"{site.module}:probabilities"
        self.linears[name] = ()
        queries: list[Tensor] = []

        def observe(module: nn.Module, args: tuple[Any, ...], key: Tensor) -> None:
            self._observe(name, sample_probabilities(queries.pop(), key, attention.heads, attention.scale))

        yield attention.to_q.register_forward_hook(lambda module, args, query: queries.append(query))
        yield attention.to_k.register_forward_hook(observe)

    def _discover(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """For an architecture without a spec: linears of a block that are given the very same tensor form a group,
        unless something has been written into it in between. A linear stays in the group of its first call."""
        block = next((block for block in blocks_of(self.model) if name.startswith(f"{block}.")), "")

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input_of(args, kwargs)
            key = (id(x), 0 if x.is_inference() else x._version, block)
            reference, readers = self._seen.get(key, (None, []))
            if reference is None or reference() is not x:
                readers = []
                self._seen[key] = (weakref.ref(x), readers)
            if name not in self._site_of:
                site = self._site_of[name] = readers[0] if readers else name
                self.linears[site] = (*self.linears.get(site, ()), name)
            if self._site_of[name] not in readers:
                readers.append(self._site_of[name])
                self._observe(self._site_of[name], x)

        return hook

    def _on_forward(self, timestep: float) -> None:
        self._seen.clear()
        if len(self.timesteps) == 1 and timestep != self.timesteps[0]:
            self.descending = timestep < self.timesteps[0]
        if timestep not in self.timesteps:
            self.timesteps.append(timestep)
        self._step = self.timesteps.index(timestep)
        if self._step not in self._visited:
            self._visited.append(self._step)

    def _observe(self, site: str, x: Tensor) -> None:
        if not x.numel():
            return  # as of an expert that no token chose
        if site not in self.observers:
            self.observers[site] = self._observer(site)
            self.observers[site].start_call(self.call)
        self.observers[site].update(x, self._step)

    def _observer(self, site: str) -> StepObserver:
        read_by_linears = self.linears.get(site) != ()
        return StepObserver(site, self.seed, second_moments=self.second_moments and read_by_linears)

    def start_call(self, call: int) -> None:
        self.call = call
        self._visited = []
        for observer in self.observers.values():
            observer.start_call(call)

    def statistics(self, about: dict[str, Any]) -> Statistics:
        """In the order of denoising, also where calls had different schedules: by value, as the first call went."""
        timesteps = torch.tensor(self.timesteps)
        order = timesteps.argsort(descending=self.descending)
        sites = {}
        for name, observer in self.observers.items():
            observer.pad_to(len(timesteps))
            tensors = (tensor[order] for tensor in observer.to_tensors().values())
            sites[name] = replace(SiteStatistics(self.linears[name], *tensors), products=observer.products)
        about = about | {"descending": self.descending}
        return Statistics(timesteps[order], sites, fingerprint_of(self.model), about, tuple(self.samples))

    def check_range(self) -> None:
        """Warns of timesteps that no pipeline of the architecture passes: in other units, groups would be others."""
        known = spec_of(self.model).timestep
        if known is None:
            return
        low, high = sorted((known.noisiest, known.cleanest))
        slack = 0.01 * (high - low)
        odd = [timestep for timestep in self.timesteps if not low - slack <= timestep <= high + slack]
        if odd:
            logger.warning(
                "%s was called at timesteps like %g; its pipelines pass %g (noise) to %g. What is calibrated serves"
                " calls in the same units alone",
                type(self.model).__name__,
                odd[0],
                known.noisiest,
                known.cleanest,
            )

    def check_finite(self) -> None:
        """Raises ValueError that names the first step, and in it the first site, that received no numbers."""
        bad = {name: observer.first_bad_step() for name, observer in self.observers.items()}
        steps = [step for step in bad.values() if step is not None]
        if steps:
            name = next(name for name, step in bad.items() if step == min(steps))
            raise not_finite(name, min(steps), self.timesteps[min(steps)])

    def resume(self, checkpoint: str | os.PathLike[str], about: dict[str, Any]) -> int:
        """Calls already done according to the file; 0 where there is none."""
        if not Path(checkpoint).exists():
            return 0
        saved = Statistics.load(checkpoint)
        try:
            saved.check_model(self.model)
        except ValueError as error:
            raise OfAnotherRun(f"the checkpoint {checkpoint} is of another run: {error}") from None
        for key, value in about.items():
            if key != "versions" and saved.about.get(key) != value:
                raise OfAnotherRun(
                    f"the checkpoint {checkpoint} is of another run: its {key} is {saved.about.get(key)!r}, now it is"
                    f" {value!r}. Give the same arguments to resume, or another checkpoint path to start anew"
                )
        self.timesteps, self.descending = saved.timesteps.tolist(), saved.descending
        self.samples = list(saved.samples)
        for name, site in saved.sites.items():
            self.linears[name] = site.linears
            self._site_of |= dict.fromkeys(site.linears, name)
            self.observers[name] = self._observer(name)
            self.observers[name].load_tensors(site.tensors())
        if "calls_done" not in saved.about:
            raise OfAnotherRun(f"{checkpoint} does not say how many calls it is of: it is no checkpoint of calibrate")
        return int(saved.about["calls_done"])
