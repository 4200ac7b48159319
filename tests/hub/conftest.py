# SPDX-License-Identifier: Apache-2.0
"""One Hub and one house of users for all tests here, an empty cache and no faults for each."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.server import Faults, Hub, running
from hub.snippets import LOAD
from hub.users import Users


@pytest.fixture(scope="package")
def _hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture(scope="package")
def _users(_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    users = Users(_hub.url, tmp_path_factory.mktemp("home"))
    yield users
    users.close()


@pytest.fixture
def hub(_hub: Hub) -> Iterator[Hub]:
    _hub.repositories.clear()
    _hub.objects.clear()
    _hub.requests.clear()
    _hub.faults = Faults()
    _hub.tokens.update(read=set())
    yield _hub
    assert _hub.unknown == []  # else the server would have to learn an endpoint


@pytest.fixture
def users(_users: Users, hub: Hub) -> Users:
    _users.forget()
    return _users


@pytest.fixture(scope="package")
def quantized(tmp_path_factory: pytest.TempPathFactory, dit_folder: Path, dit_statistics) -> dict[str, str]:
    """Folders of the tiny pipeline, by HTG at W8A8 and by RTN at W4A8, of the original, and the statistics' file."""
    from diffusers import DiTPipeline

    import diffusers_dq as dq

    folders = {"full": str(dit_folder)}
    for name, config in {"htg": dq.DQConfig("htg"), "rtn": dq.DQConfig("rtn", weight_bits=4)}.items():
        pipe = DiTPipeline.from_pretrained(dit_folder)
        dq.quantize(pipe, config, statistics=dit_statistics, progress=False)
        folders[name] = str(tmp_path_factory.mktemp(name) / "pipeline")
        pipe.save_pretrained(folders[name])
    folders["statistics"] = str(tmp_path_factory.mktemp("statistics") / "statistics.safetensors")
    dit_statistics.save(folders["statistics"])
    return folders


@pytest.fixture
def expected(users: Users, quantized: dict[str, str]) -> str:
    """Of pictures that the saved pipeline makes without a Hub."""
    return users.does(LOAD, repo=quantized["htg"])
