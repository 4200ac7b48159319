# SPDX-License-Identifier: Apache-2.0
"""What `import diffusers_dq` costs and needs: each test asks a process of its own."""

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = (ROOT / "diffusers_dq", ROOT / "diffusers_dq_cli", ROOT / "kernels" / "diffusers_dq_kernels")
# Of packages whose modules are called otherwise.
MODULES = {"import-linter": "importlinter", "pre-commit": "pre_commit", "pytest-xdist": "xdist"}
IMPORTERS = {"import_module", "optional"}  # functions of one argument, the name of a module


def python(code: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def packages_of(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


DEPENDENCIES = packages_of(PROJECT["dependencies"])
EXTRAS = {extra: packages_of(listed) for extra, listed in PROJECT["optional-dependencies"].items()}


def optional_modules() -> list[str]:
    names = set().union(*EXTRAS.values()) - DEPENDENCIES
    return sorted(MODULES.get(name, name.replace("-", "_")) for name in names)


def imports_of(tree: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, lazy) of each import. Lazy: in a function, in `if TYPE_CHECKING`, in a `try`, or by `IMPORTERS`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module, lazy
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "id", getattr(node.func, "attr", None))
            if function in IMPORTERS:
                yield node.args[0].value, True
        yield from imports_of(node, lazy or isinstance(node, ast.FunctionDef | ast.Lambda | ast.Try | ast.If))


owners = functools.cache(metadata.packages_distributions)  # of each module, the packages that install it


def foreign_imports(text: str) -> set[tuple[str, bool]]:
    """(package, lazy) of what is neither Python's nor ours."""
    tops = {(module.partition(".")[0], lazy) for module, lazy in imports_of(ast.parse(text))}
    return {
        (canonicalize_name(owners().get(top, [top])[0]), lazy)
        for top, lazy in tops
        if top not in sys.stdlib_module_names and not top.startswith("diffusers_dq")
    }


def test_imports_are_read_from_a_source():
    text = """
import os, yaml
from PIL import Image
from . import PIL, brother
try:
    import triton
except ImportError:
    triton = None
def late():
    from transformers import AutoModel
    return optional("torchmetrics.functional"), importlib.import_module("no_such.module"), optional(name)
"""
    assert foreign_imports(text) == {
        ("pyyaml", False),
        ("pillow", False),
        ("triton", True),
        ("transformers", True),
        ("torchmetrics", True),
        ("no-such", True),
    }


def test_all_that_is_imported_is_declared():
    """At a module's top only dependencies, elsewhere extras too, though none that only developers have."""
    for_users = DEPENDENCIES.union(*(EXTRAS[extra] for extra in EXTRAS.keys() - {"dev", "docs"}))
    found = {
        (package, lazy, path.relative_to(ROOT).as_posix())
        for folder in PACKAGES
        for path in folder.rglob("*.py")
        for package, lazy in foreign_imports(path.read_text(encoding="utf-8"))
    }
    assert {"torch", "pyyaml", "pillow", "torchmetrics", "sdnq"} <= {package for package, _, _ in found}
    undeclared = {entry for entry in found if entry[0] not in (for_users if entry[1] else DEPENDENCIES)}
    assert not undeclared, sorted(undeclared)


def test_no_dependency_is_declared_in_vain():
    used = {
        package
        for folder in PACKAGES
        for path in folder.rglob("*.py")
        for package, _ in foreign_imports(path.read_text())
    }
    assert not DEPENDENCIES - used


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
