# SPDX-License-Identifier: Apache-2.0
"""The rules of .pre-commit-config.yaml that search for what must not be written, on every file they are for."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOOKS = [
    hook
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]
    if hook["language"] == "pygrep"
]
BROKEN = {
    "rounding-in-one-place": ["torch.round(x)", "(x / scale).round()"],
    "no-global-state": ["torch.backends.cudnn.benchmark = True", "torch.set_num_threads(1)", "os.environ['A'] = 'b'"],
    "no-pickle": ["import pickle", "np.load(file, allow_pickle=True)", "torch.load(file)", "pickle.load(file)"],
}


@pytest.mark.parametrize("hook", HOOKS, ids=[hook["id"] for hook in HOOKS])
def test_no_file_breaks_the_rule(hook):
    files = [path for path in ROOT.rglob("*.py") if not {".venv", "build"} & set(path.relative_to(ROOT).parts)]
    names = [str(path.relative_to(ROOT)) for path in files]
    names = [
        name for name in names if re.search(hook["files"], name) and not re.search(hook.get("exclude", "^$"), name)
    ]
    lines = [(name, line) for name in names for line in (ROOT / name).read_text().splitlines()]
    assert len(names) > 20
    assert [(name, line) for name, line in lines if re.search(hook["entry"], line)] == []


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in BROKEN.items() for line in lines])
def test_the_rule_sees_what_breaks_it(name, line):
    (entry,) = [hook["entry"] for hook in HOOKS if hook["id"] == name]
    assert re.search(entry, line)
    assert not re.search(entry, "torch.load(file, weights_only=True)") and not re.search(entry, "os.environ['A']")
