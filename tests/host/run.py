# SPDX-License-Identifier: Apache-2.0
"""`make test-host`: diffusers' own tests of quantizers, at one commit, on ours.

They are fetched into a cache folder, never into this repository: from GitHub, or from the git repository that the
environment variable DIFFUSERS_TESTS names (a folder or an address) where GitHub cannot be reached.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMMIT = "58eb52c0803ea9af3abec60841c2a093bdf1f951"  # of August 2026; diffusers publishes its tests in no package
GITHUB = "https://github.com/huggingface/diffusers"
HERE = Path(__file__).resolve().parent


def git(*arguments: str, folder: Path, source: str = GITHUB) -> str:
    """What it prints. A local source may belong to another user."""
    command = ["git", "-C", str(folder), "-c", f"safe.directory={source}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def fetch(source: str, folder: Path) -> None:
    """The folder `tests` of the commit; nothing is left of a fetch that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        tree = Path(temporary) / "tree"
        tree.mkdir()
        git("init", "--quiet", folder=tree)
        git("sparse-checkout", "set", "tests", folder=tree)
        git("remote", "add", "origin", source, folder=tree)
        git("fetch", "--quiet", "--depth", "1", "--filter=blob:none", "origin", COMMIT, folder=tree, source=source)
        git("checkout", "--quiet", COMMIT, folder=tree, source=source)
        tree.rename(folder)


def checked(folder: Path) -> bool:
    """Whether the folder holds the commit and nothing else."""
    try:
        head, changes = git("rev-parse", "HEAD", folder=folder), git("status", "--porcelain", folder=folder)
    except (OSError, subprocess.CalledProcessError):
        return False
    return head == COMMIT and not changes


def main() -> int:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusers_dq" / "host"
    folder, source = cache / COMMIT, os.environ.get("DIFFUSERS_TESTS") or GITHUB
    if not checked(folder):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            fetch(source, folder)
        except subprocess.CalledProcessError as error:
            print(
                f"cannot fetch commit {COMMIT} from {source}:\n{error.stderr}\nSet DIFFUSERS_TESTS to a git repository"
                " of diffusers that has it, a folder or an address.",
                file=sys.stderr,
            )
            return 1
        if not checked(folder):
            print(f"{folder} is not commit {COMMIT} as it was: remove it and start again", file=sys.stderr)
            return 1
    environment = os.environ | {
        "DIFFUSERS_TEST_DEVICE": os.environ.get("DIFFUSERS_TEST_DEVICE", "cpu:0"),  # "cpu" would skip most of them
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(folder),
    }
    options = ["-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE), "--confcutdir", str(HERE)]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / "suite.py"), *sys.argv[1:]]
    return subprocess.run(command, env=environment, cwd=HERE).returncode


if __name__ == "__main__":
    raise SystemExit(main())
