# SPDX-License-Identifier: Apache-2.0
"""`diffusers-dq benchmark ...`"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from diffusers_dq.benchmark import bars, environment, plan, report
from diffusers_dq.benchmark.gemm import Gemm, gemm_part, peak_part
from diffusers_dq.benchmark.models import CASES, case_of
from diffusers_dq.benchmark.peers import import_plain_sdnq
from diffusers_dq.benchmark.pipeline import pipeline_part
from diffusers_dq.benchmark.plot import save_plot
from diffusers_dq.benchmark.results import Results, check_place
from diffusers_dq.benchmark.session import Part, Session
from diffusers_dq.benchmark.settings import Mode, Settings
from diffusers_dq.benchmark.stage import BOTH
from diffusers_dq.benchmark.step import step_part
from diffusers_dq.benchmark.variants import VARIANTS
from diffusers_dq.commands.console import emit, note
from diffusers_dq.commands.options import Json
from diffusers_dq.hardware import CHECKOUT

app = typer.Typer(no_args_is_help=True, help="Speed and size against full precision and the peers.")

Device = Annotated[str, typer.Option(help="cpu or cuda; by default cuda where there is one")]
Rounds = Annotated[int, typer.Option(help="times each contestant runs, in turns")]
MaxSeconds = Annotated[float, typer.Option(min=0, help="of a group of contestants, after 5 rounds")]
Scope = Annotated[str, typer.Option(help="torch.compile of the whole 'model' or of its repeated 'blocks'")]
Graphs = Annotated[bool | None, typer.Option(help="CUDA graphs for every contestant, or for none; on a GPU for every")]
Output = Annotated[Path | None, typer.Option(help="results file; by default one named after the hardware")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace results in the usual place")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the results file: leave out what it holds")]
Commit = Annotated[str | None, typer.Option(help="to note, where there is no git checkout to ask")]
Profile = Annotated[bool, typer.Option("--profile", help="after timing, where each contestant's step spends its time")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of torch")]
Models = Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(CASES)}")]
Layers = Annotated[int | None, typer.Option(help="fewer layers than the published model")]
Batch = Annotated[int | None, typer.Option(help="pictures or videos; guidance doubles it")]
Tokens = Annotated[int | None, typer.Option(help="of a picture or frame, a square number")]
Heads = Annotated[int | None, typer.Option(help="attention heads; the width is heads times head dimension")]
HeadDim = Annotated[int | None, typer.Option(help="channels of an attention head, a multiple of 16")]
Frames = Annotated[int | None, typer.Option(help="of a video")]
Cfg = Annotated[bool | None, typer.Option(help="guidance, which doubles the batch")]
Contestants = Annotated[list[str] | None, typer.Option("--contestant", help=f"of {', '.join(VARIANTS)}; may repeat")]


@dataclass(frozen=True)
class Run:
    """One invocation.   command: in the file's name.   overwrite: results that are in its usual place already."""

    command: str
    settings: Settings
    output: Path | None = None
    resume: bool = False
    commit: str | None = None
    overwrite: bool = False
    budget: float = float("inf")
    as_json: bool = False

    def measure(self, parts: Sequence[Part]) -> Results:
        """Measures, prints and judges; the file is whole after each part. With `as_json` stdout has the results alone,
        as the file has them, and where they are."""
        results = self._results()
        about = results.about
        say = note if self.as_json else typer.echo
        say(f"{about['hardware']}, {about['threads']} CPU threads; results: {results.path}")
        Session(self.settings, results, say, self.budget).run(parts)
        results.bars = bars.judge_all(results)
        results.save()
        text = "\nbars:\n" + "\n".join(bars.line(judged) for judged in results.bars) + f"\n\nwritten: {results.path}"
        emit({"results": results.path, **results.to_dict()}, text, as_json=self.as_json)
        return results

    def _results(self) -> Results:
        about: dict[str, Any] = environment.about(self.settings.device, self.commit)
        about["settings"] = asdict(self.settings)
        name = f"{self.command}-{environment.slug(about['hardware'])}.json"
        path = self.output or environment.results_folder() / name
        check_place(path)
        if self.output is None and path.exists() and not (self.resume or self.overwrite):
            raise ValueError(
                f"{path} holds results already: --resume goes on with them, --overwrite replaces them, --output"
                " writes elsewhere"
            )
        return Results.resume(path, about) if self.resume else Results(about, path)


@app.command("all")
def measure_all(
    device: Device = "",
    rounds: Rounds = 30,
    max_seconds: MaxSeconds = 40.0,
    scope: Scope = "",
    cuda_graphs: Graphs = None,
    budget: Annotated[float, typer.Option(help="seconds after which no further part begins; see --resume")] = 1e9,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="every path at tiny sizes on the CPU: no figures")
    ] = False,
    profile: Profile = False,
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    commit: Commit = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """All that the project promises, the most important first: about 8 minutes on an H200."""
    if dry_run:
        device, rounds = device or "cpu", 2
    settings = _settings(device, rounds, max_seconds, scope, cuda_graphs, threads, profile)
    if dry_run:
        import_plain_sdnq()
        settings = replace(settings, backend="aot_eager")
        output = output or Path.cwd() / "dry-run.json"
    run = Run("all", settings, output, resume, commit, overwrite, budget, json)
    run.measure(plan.dry_plan() if dry_run else plan.full_plan(settings.device))


@app.command("gemm")
def measure_gemm(
    shapes: Annotated[
        list[str] | None, typer.Argument(help="MxNxK, as 4096x1152x4608; by default the models'")
    ] = None,
    device: Device = "",
    rounds: Rounds = 30,
    max_seconds: MaxSeconds = 40.0,
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    commit: Commit = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Matrix products alone, against bf16, torch._int_mm and fp8."""
    settings = _settings(device, rounds, max_seconds, "", None, threads)
    peak = peak_part(plan.PEAK_SIZE[settings.device])
    parts = [gemm_part(_gemm(shape)) for shape in shapes] if shapes else plan.gemm_parts(settings.device)
    Run("gemm", settings, output, resume, commit, overwrite, as_json=json).measure([peak, *parts])


@app.command("step")
def measure_step(
    models: Models = None,
    layers: Layers = None,
    batch: Batch = None,
    tokens: Tokens = None,
    heads: Heads = None,
    head_dim: HeadDim = None,
    frames: Frames = None,
    cfg: Cfg = None,
    contestant: Contestants = None,
    mode: Annotated[list[str] | None, typer.Option(help="eager or compiled; both by default")] = None,
    device: Device = "",
    rounds: Rounds = 30,
    max_seconds: MaxSeconds = 60.0,
    scope: Scope = "",
    cuda_graphs: Graphs = None,
    profile: Profile = False,
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    commit: Commit = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """One denoising step of each model, for every contestant."""
    settings = _settings(device, rounds, max_seconds, scope, cuda_graphs, threads, profile)
    sizes = dict(layers=layers, batch=batch, tokens=tokens, heads=heads, head_dim=head_dim, frames=frames, cfg=cfg)
    names = tuple(contestant) if contestant else None
    modes = _modes(mode)
    parts = [step_part(case_of(name).changed(**sizes), names, modes) for name in models or CASES]
    peak = peak_part(plan.PEAK_SIZE[settings.device])
    Run("step", settings, output, resume, commit, overwrite, as_json=json).measure([peak, *parts])


@app.command("pipeline")
def measure_pipeline(
    model: Annotated[str, typer.Argument(help="dit-512 or dit-256")] = "dit-512",
    steps: Annotated[int, typer.Option(min=1, help="denoising steps of a picture")] = 20,
    layers: Layers = None,
    batch: Batch = None,
    tokens: Tokens = None,
    heads: Heads = None,
    head_dim: HeadDim = None,
    cfg: Cfg = None,
    device: Device = "",
    rounds: Rounds = 10,
    max_seconds: MaxSeconds = 120.0,
    scope: Scope = "",
    output: Output = None,
    overwrite: Overwrite = False,
    commit: Commit = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Latents a second of a whole DiT pipeline."""
    settings = _settings(device, rounds, max_seconds, scope, False, threads)
    sizes = dict(layers=layers, batch=batch, tokens=tokens, heads=heads, head_dim=head_dim, cfg=cfg)
    part = pipeline_part(case_of(model).changed(**sizes), steps)
    Run("pipeline", settings, output, False, commit, overwrite, as_json=json).measure([part])


@app.command("report")
def write_report(
    results: Annotated[Path | None, typer.Option(help="folder of results files")] = None,
    readme: Annotated[Path | None, typer.Option(help="file with the markers; by default kernels/README.md")] = None,
    json: Json = False,
) -> None:
    """Writes the tables of kernels/README.md and the plot from the results files."""
    folder = results or environment.results_folder()
    readme = readme or CHECKOUT / "kernels" / "README.md"
    found, left_out = report.load_all(folder)
    if not found:
        reasons = "".join(f"; {name} {reason}" for name, reason in left_out.items())
        raise ValueError(f"{folder} holds no results to report{reasons}: give --results a folder of results files")
    report.write_readme(readme, report.section(found, left_out))
    drawn = save_plot(found, folder / report.PLOT)
    for name, reason in left_out.items():
        note(f"not shown: {name} {reason}")
    written = [readme, folder / report.PLOT] if drawn else [readme]
    text = f"written: {', '.join(map(str, written))}" + " (no step measured: no plot)" * (not drawn)
    emit({"files": written, "left_out": left_out}, text, as_json=json)


def _settings(
    device: str,
    rounds: int,
    max_seconds: float,
    scope: str,
    cuda_graphs: bool | None,
    threads: int | None,
    profile: bool = False,
) -> Settings:
    """With what depends on the device filled in: on a GPU blocks are compiled, and CUDA graphs are for all."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device == "cuda"
    if threads is not None:
        torch.set_num_threads(threads)
    return Settings(
        device=device,
        rounds=rounds,
        max_seconds=max_seconds,
        scope=scope or ("blocks" if on_gpu else "model"),  # type: ignore[arg-type] # checked there
        cuda_graphs=on_gpu if cuda_graphs is None else cuda_graphs,
        profile=profile,
    )


def _gemm(shape: str) -> Gemm:
    sizes = shape.lower().split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"a shape is MxNxK in positive numbers, as 4096x1152x4608; got {shape!r}")
    return Gemm("given", *map(int, sizes))


def _modes(names: Sequence[str] | None) -> tuple[Mode, ...]:
    unknown = set(names or ()) - set(BOTH)
    if unknown:
        raise ValueError(f"mode must be eager or compiled, got {', '.join(sorted(unknown))}")
    return tuple(mode for mode in BOTH if not names or mode in names)
