# SPDX-License-Identifier: Apache-2.0
"""Processes that come to grief: forked, so that what has been imported and calibrated need not be again."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def in_fork(work: Callable[[], object]) -> int | str:
    """How `work` ended in a forked process: "" if it returned, "Error: message" if it raised, or a signal's number."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}"[:4000].encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else said


@pytest.fixture
def forked() -> Callable[[Callable[[], object]], int | str]:
    return in_fork


class Killer:
    """Kills its process, with no chance to clean up, the `at`-th time that one of the watched functions is reached."""

    def __init__(self, at: int) -> None:
        self.left = at

    def point(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.point()
            return function(*args, **kwargs)

        return watched

    def halfway(self, save_file: Callable[..., Any]) -> Callable[..., Any]:
        """Of a file that is written in place, as safetensors did before it wrote to another name: half of it."""

        def watched(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            save_file(tensors, path, *args, **kwargs)
            if self.left == 0:
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: len(content) // 2])
            self.point()

        return watched


@pytest.fixture
def killing() -> type[Killer]:
    return Killer


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """A soft limit of the process, for a while."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@pytest.fixture
def file_size_limit() -> Callable[[int], Any]:
    """A function: a context in which no file may grow beyond so many bytes, an error as a full disk is one."""
    return lambda size: limited(resource.RLIMIT_FSIZE, size)
