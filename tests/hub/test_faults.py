# SPDX-License-Identifier: Apache-2.0
"""Networks that are not there or break off, processes that are killed, and others who push in between."""

import os
import signal

import pytest
from hub.server import Hub
from hub.snippets import LOAD, PUSH, WEIGHTS
from hub.users import Users
from huggingface_hub.errors import HTTPError  # the base of its client's own

from diffusers_dq.repository import explained


def test_without_a_network(users: Users, quantized):
    code = (
        "import time\ntime.sleep = lambda seconds: None\n"  # the client tries again for 23 seconds
        "from huggingface_hub import constants\n"
        "template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)\n"
        "constants.HUGGINGFACE_CO_URL_TEMPLATE = template\n"
        "constants.ENDPOINT = url\n"
    )
    nobody = "http://127.0.0.1:9"
    outcome = users.run(code + PUSH, repo="user/tiny", url=nobody, **quantized)
    assert outcome.error == "ConnectionError" and f"{nobody} cannot be reached" in outcome.message
    outcome = users.run(code + 'dq.Statistics.load("user/statistics")', url=nobody)
    assert outcome.error == "ConnectionError" and "no file user/statistics on this disk" in outcome.message
    code = "import huggingface_hub\nhuggingface_hub.constants.HF_HUB_OFFLINE = True\n"
    outcome = users.run(code + PUSH, repo="user/tiny", **quantized)
    assert outcome.error == "ConnectionError" and "HF_HUB_OFFLINE is set" in outcome.message


def test_an_upload_that_is_cut_off_goes_on_by_itself(hub: Hub, users: Users, quantized, expected):
    hub.faults.uploads = 1
    users.does(PUSH, repo="user/tiny", **quantized)
    assert len(hub.asked("PUT", "^/lfs/")) == 3 and users.does(LOAD, repo="user/tiny") == expected


def test_a_killed_upload_shows_nothing_and_a_rerun_completes(hub: Hub, users: Users, quantized, expected):
    hub.faults.stall = "upload"
    pid = users.start(PUSH, repo="user/tiny", **quantized)
    assert hub.faults.stalled.wait(60)
    os.kill(pid, signal.SIGKILL)
    assert users.finish().status == -signal.SIGKILL
    assert list(hub.repositories["user/tiny"].files()) == [".gitattributes"]
    assert users.run(LOAD, repo="user/tiny").error == "RemoteEntryNotFoundError"  # diffusers': no model_index.json
    hub.faults.stall = ""
    users.does(PUSH, repo="user/tiny", **quantized)
    assert len(hub.repositories["user/tiny"].messages) == 2
    assert users.does(LOAD, repo="user/tiny") == expected


def test_a_push_that_breaks_off_at_the_commit_is_not_uploaded_again(hub: Hub, users: Users, quantized, expected):
    hub.faults.commits = 1
    outcome = users.run(PUSH, repo="user/tiny", **quantized)
    assert outcome.error == "ConnectionError" and "run the same again; nothing of it is visible yet" in outcome.message
    assert list(hub.repositories["user/tiny"].files()) == [".gitattributes"]
    sent = len(hub.asked("PUT", "^/lfs/"))
    users.does(PUSH, repo="user/tiny", **quantized)
    assert len(hub.asked("PUT", "^/lfs/")) == sent and users.does(LOAD, repo="user/tiny") == expected


def test_a_second_push_that_breaks_off_leaves_the_first(hub: Hub, users: Users, quantized, expected):
    users.does(PUSH, repo="user/tiny", **quantized)
    hub.faults.commits = 1
    outcome = users.run('dq.push_to_hub(DiTPipeline.from_pretrained(rtn), "user/tiny")', **quantized)
    assert outcome.error == "ConnectionError" and users.does(LOAD, repo="user/tiny") == expected


def test_a_push_does_not_overwrite_what_came_in_between(hub: Hub, users: Users, quantized):
    users.does('dq.Statistics.load(statistics).push_to_hub("user/tiny")', **quantized)
    repository = hub.repositories["user/tiny"]
    before = repository.branches["main"]
    repository.commit("main", {"notes.txt": b"new"}, "by someone else")
    outcome = users.run(
        """
from pathlib import Path
from huggingface_hub import HfApi
from diffusers_dq.repository import send
send(HfApi(), "user/tiny", {"notes.txt": Path(statistics)}, message="late", revision=None, parent=parent)
""",
        parent=before,
        **quantized,
    )
    assert outcome.error == "RuntimeError" and "someone else changed it in between (412)" in outcome.message
    assert repository.files() == {"notes.txt": b"new"}


def test_a_download_that_is_cut_off_goes_on_where_it_was(hub: Hub, users: Users, quantized, expected):
    users.does(PUSH, repo="user/tiny", **quantized)
    hub.faults.downloads = 1
    small = "import huggingface_hub\nhuggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096\n"  # 10 MB by default
    assert users.does(small + LOAD, repo="user/tiny") == expected
    assert [request for request in hub.asked("GET", "/resolve/") if "Range" in request[2]]


def test_a_killed_download_is_not_taken_for_a_model_and_a_rerun_completes(hub: Hub, users: Users, quantized, expected):
    users.does(PUSH, repo="user/tiny", **quantized)
    hub.faults.stall = "download"
    pid = users.start(LOAD, repo="user/tiny")
    assert hub.faults.stalled.wait(60)
    os.kill(pid, signal.SIGKILL)
    assert users.finish().status == -signal.SIGKILL
    assert not list((users.home / "hub").rglob(f"snapshots/*/{WEIGHTS}"))
    hub.faults.stall = ""
    assert users.does(LOAD, repo="user/tiny") == expected


def test_an_upload_broken_off_in_the_clients_threads_is_explained():
    """The client wraps what happens to one file."""
    with pytest.raises(ConnectionError, match="cannot upload user/repo") as caught, explained("upload", "user/repo"):
        try:
            raise HTTPError("closed")
        except HTTPError as error:
            raise RuntimeError("Error while uploading 'x' to the Hub.") from error
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_other_errors_pass_as_they_are():
    for error in (RuntimeError("ours"), KeyError("x"), FileNotFoundError("y")):
        with pytest.raises(type(error)) as caught, explained("upload", "user/repo"):
            raise error
        assert caught.value is error
