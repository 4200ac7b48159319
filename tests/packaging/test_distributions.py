# SPDX-License-Identifier: Apache-2.0
"""Wheel and source distribution: what is in them, and that the wheel works from a directory that has no checkout.

What they are built from is a copy of what git would commit, so that nothing left lying about is taken for needed.
"""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import diffusers_dq as dq

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[2]
PACKAGES = {"diffusers_dq": ".", "diffusers_dq_cli": ".", "diffusers_dq_kernels": "kernels"}
CACHES = re.compile(r"(^|/)__pycache__/|\.py[co]$")


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with one wheel, made from the one source distribution beside it."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).exists() or (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", cwd=source)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    [path] = built.glob("*.whl")
    return path


def source_files(source: Path, package: str) -> set[str]:
    """Of a package, relative to what holds it."""
    base = source / PACKAGES[package]
    folders = [base / package, *(link for link in (base / package).iterdir() if link.is_symlink())]
    paths = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    return {path.relative_to(base).as_posix() for path in paths if not CACHES.search(str(path.relative_to(base)))}


@pytest.mark.slow
def test_the_wheel_has_both_packages_with_their_data_and_nothing_else(wheel):
    names = {
        name for name in zipfile.ZipFile(wheel).namelist() if not re.match(r"diffusers_dq-[^/]+\.dist-info/", name)
    }
    assert names == set().union(*(source_files(wheel.parents[1] / "source", package) for package in PACKAGES))
    for expected in (
        "diffusers_dq/py.typed",
        "diffusers_dq/demo_model/transformer/diffusion_pytorch_model.safetensors",
        "diffusers_dq_kernels/py.typed",
        "diffusers_dq_kernels/tiles/sm_90.json",
    ):
        assert expected in names
    assert wheel.stat().st_size < 14e6  # 12.4 MB, 12.0 of which are the demo model


@pytest.mark.slow
def test_the_source_distribution_has_what_a_wheel_is_built_from_and_nothing_else(built):
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
    assert all(member.isfile() for member in members)  # no link
    names = {member.name.partition("/")[2] for member in members}
    sources = {
        f"{'kernels/' if package == 'diffusers_dq_kernels' else ''}{name}"
        for package in PACKAGES
        for name in source_files(built.parent / "source", package)
    }
    assert sources <= names
    beside = {name for name in names - sources if not name.startswith("diffusers_dq.egg-info/")}
    assert beside == {
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "constraints.txt",
        "pyproject.toml",
        "setup.cfg",
    }
    assert path.stat().st_size < 14e6


@pytest.mark.slow
def test_metadata_says_what_the_project_says(wheel):
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["Version"] == dq.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function: runs a program of an environment that has Python and pip alone, in an empty folder elsewhere, with
    none of this process's paths. It is given the exit code to expect, else 0.
    """
    folder = tmp_path_factory.mktemp("clean")
    (folder / "elsewhere").mkdir()
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    hidden = ("PYTHON", "VIRTUAL_ENV", "TRITON_INTERPRET", "COVERAGE", "COV_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}

    def call(program: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [folder / "venv" / "bin" / program, *map(str, arguments)],
            cwd=folder / "elsewhere",
            capture_output=True,
            text=True,
            env=environment | {"OMP_NUM_THREADS": "1"},
            timeout=900,
        )
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
        return done

    return call


@pytest.mark.slow
def test_in_a_clean_environment_it_says_what_it_lacks_and_then_works(clean, wheel, tmp_path):
    """Plain first, then with the extra. torch is the one of constraints.txt: the registry's newest brings gigabytes of
    CUDA packages."""

    def install(*what: object) -> None:
        clean("python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *what)

    install("torch")
    install(wheel)
    clean("python", "-m", "pip", "check")
    listed = json.loads(clean("python", "-m", "pip", "list", "--format", "json").stdout)
    assert not {"matplotlib", "torchmetrics", "transformers"} & {package["name"] for package in listed}
    where = clean("python", "-c", "import diffusers_dq as dq; dq.push_to_hub; print(dq.__file__)").stdout
    assert "site-packages" in where and str(ROOT) not in where
    assert "calibrate" in clean("diffusers-dq", "--help").stdout
    examined = json.loads(clean("diffusers-dq", "doctor", "--json").stdout)
    assert examined["healthy"] and examined["versions"]["diffusers-dq"] == dq.__version__
    advice = {finding["do"] for finding in examined["findings"]}
    assert "pip install 'diffusers-dq[eval]'" in advice

    demo = ["demo", "--images", 1, "--steps", 2, "-o", tmp_path / "output"]
    said = clean("diffusers-dq", *demo, code=1).stderr
    assert "pip install diffusers-dq[eval]" in said and "Traceback" not in said
    assert not (tmp_path / "output" / "grid.png").exists()

    install(f"diffusers-dq[eval] @ {wheel.as_uri()}")
    clean("python", "-m", "pip", "check")
    printed = clean("diffusers-dq", *demo).stdout
    assert "full precision" in printed and "quality" in printed
    assert (tmp_path / "output" / "grid.png").stat().st_size > 1000


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "diffusers_dq.__version__"}
    assert re.search(rf"^## {re.escape(dq.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_demo_model_of_a_checkout_is_the_one_of_the_examples():
    model = ROOT / "diffusers_dq" / "demo_model"
    assert model.resolve() == ROOT / "examples" / "dit-cifar10"
    assert (model / "model_index.json").is_file()
