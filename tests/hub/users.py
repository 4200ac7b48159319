# SPDX-License-Identifier: Apache-2.0
"""People at their machines: each snippet of Python runs in a process of its own, with a Hub at HF_ENDPOINT.

The client reads HF_ENDPOINT when it is imported, so it cannot run in pytest's process. Importing torch and diffusers
takes seconds, so one process imports them, holds no model, and forks one process a snippet.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """result: what the snippet assigned to `result`.   error, message: of the exception it ended with, if it did.
    causes: names of the exceptions that it was raised from.   status: of the process, negative for a signal.
    log: what it wrote to stderr."""

    status: int
    result: Any = None
    error: str = ""
    message: str = ""
    causes: list[str] = field(default_factory=list)
    log: str = ""


class Users:
    def __init__(self, endpoint: str, home: Path) -> None:
        environment = {**os.environ, **environment_of(endpoint, home)}
        environment.pop("HF_TOKEN", None)
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, code: str, token: str | None = "write", **variables: Any) -> int:
        """The process's id."""
        assert self.process.stdin is not None
        self.folder = tempfile.mkdtemp(dir=self.home)
        request = {"code": code, "token": token, "variables": variables, "folder": self.folder}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.answer()["pid"])

    def finish(self) -> Outcome:
        status = int(self.answer()["status"])
        written = Path(self.folder, "result.json")
        found = json.loads(written.read_text()) if written.exists() else {}
        return Outcome(status=status, log=Path(self.folder, "log").read_text(errors="replace"), **found)

    def run(self, code: str, token: str | None = "write", **variables: Any) -> Outcome:
        """variables: JSON-able, names of the snippet."""
        self.start(code, token, **variables)
        return self.finish()

    def does(self, code: str, token: str | None = "write", **variables: Any) -> Any:
        """`run` of what has to work: its result."""
        outcome = self.run(code, token, **variables)
        assert (outcome.error, outcome.status) == ("", 0), f"{outcome.message}\n{outcome.log}"
        return outcome.result

    def forget(self) -> None:
        """All that was downloaded."""
        shutil.rmtree(self.home / "hub", ignore_errors=True)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def environment_of(endpoint: str, home: Path) -> dict[str, str]:
    """Without Xet, which huggingface_hub prefers where hf_xet is installed: its uploads go to a content-addressed
    store of another protocol, in compiled code, that cannot be answered here."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
    }


def serve() -> None:
    import torch
    from diffusers import DiTPipeline, DiTTransformer2DModel

    import diffusers_dq as dq

    torch.set_num_threads(1)
    names = dict(torch=torch, dq=dq, DiTPipeline=DiTPipeline, DiTTransformer2DModel=DiTTransformer2DModel)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(request, names)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


def run(request: dict[str, Any], names: dict[str, Any]) -> None:
    """In the forked process, which ends here."""
    log = os.open(f"{request['folder']}/log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if request["token"] is not None:
        os.environ["HF_TOKEN"] = request["token"]
    names = {**names, **request["variables"]}
    outcome: dict[str, Any] = {}
    try:
        exec(request["code"], names)
        outcome["result"] = names.get("result")
    except BaseException as error:
        traceback.print_exc()
        causes, cause = [], error.__cause__
        while cause is not None:
            causes.append(type(cause).__name__)
            cause = cause.__cause__
        outcome = {"error": type(error).__name__, "message": str(error), "causes": causes}
    with suppress(OSError):
        Path(request["folder"], "result.json").write_text(json.dumps(outcome))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    serve()
