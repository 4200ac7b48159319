# SPDX-License-Identifier: Apache-2.0
"""What `import diffusers_dq` costs and needs: each test asks a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[2]
# Names of packages whose modules are called otherwise. pillow is what diffusers itself requires.
MODULES = {"import-linter": "importlinter", "pre-commit": "pre_commit", "pytest-xdist": "xdist"}
NOT_OPTIONAL = {"pillow"}


def python(code: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def optional_modules() -> list[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[\[<>=! ]", package)[0] for packages in extras.values() for package in packages}
    return sorted(MODULES.get(name, name.replace("-", "_")) for name in names - NOT_OPTIONAL)


@pytest.mark.slow
def test_it_takes_less_than_a_second_beyond_torch_and_diffusers():
    """CPU seconds, as other processes run beside the tests; 0.10 to 0.21 on two cores of an AMD EPYC."""
    loaded = json.loads(
        python(
            "import json, sys, diffusers_dq; print(json.dumps([m for m in sys.modules if m.startswith('diffusers.')]))"
        )
    )
    seconds = python(
        f"import importlib, time, torch\nfor name in {loaded!r}: importlib.import_module(name)\n"
        "start = time.process_time()\nimport diffusers_dq\nprint(time.process_time() - start)"
    )
    assert float(seconds) < 1


def test_it_imports_none_of_the_extras_nor_what_is_slow_and_seldom_needed():
    """By whom each import statement is run: diffusers and transformers import scipy and more for themselves."""
    ours = python(
        """
import builtins
original, found = builtins.__import__, set()

def spy(name, globals=None, *rest, **more):
    importer = (globals or {}).get("__name__", "")
    if importer.startswith("diffusers_dq"):
        found.add(f"{name.partition('.')[0]} in {importer}")
    return original(name, globals, *rest, **more)

builtins.__import__ = spy
import diffusers_dq
builtins.__import__ = original
print("\\n".join(found))
"""
    )
    importers = dict(line.split(" in ") for line in ours.splitlines())
    assert "torch" in importers
    unwanted = {*optional_modules(), "scipy", "typer"} & importers.keys()
    assert not unwanted, {name: importers[name] for name in unwanted}


def test_it_works_without_any_extra():
    absent = optional_modules()
    assert {"matplotlib", "torchmetrics", "transformers", "torchao", "mkdocs"} <= set(absent)
    printed = python(
        f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
        "import diffusers_dq as dq\nprint(len(dq.methods()), dq.DQConfig('rtn').method)"
    )
    assert printed.split()[1] == "rtn"


def test_help_imports_neither_torch_nor_diffusers():
    printed = python(
        "import sys\nfrom typer.testing import CliRunner\nfrom diffusers_dq_cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "print(result.exit_code, [m for m in ('torch', 'diffusers', 'diffusers_dq') if m in sys.modules])"
    )
    assert printed.strip() == "0 []"
