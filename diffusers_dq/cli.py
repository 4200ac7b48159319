# SPDX-License-Identifier: Apache-2.0
"""The command `diffusers-dq`: each subcommand is a thin layer over a function of the package."""

import typer

from diffusers_dq.benchmark.commands import app as benchmark
from diffusers_dq.evaluation.commands import evaluate

app = typer.Typer(
    name="diffusers-dq",
    help="Post-training quantization of diffusion transformers inside diffusers.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.add_typer(benchmark, name="benchmark")
app.command()(evaluate)


if __name__ == "__main__":
    app()
