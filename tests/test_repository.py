# SPDX-License-Identifier: Apache-2.0
"""What is said of answers that a test server never gives; the rest of it is in tests/hub."""

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from diffusers_dq.repository import cached, explained, named_on_hub


def answer(status):
    request = httpx.Request("POST", "https://huggingface.co/api/models/user/x/commit/main")
    return HfHubHTTPError(f"{status} for url", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("status", "kind", "says"),
    [
        (429, ConnectionError, "limits how often one may ask \\(429\\). Wait some minutes"),
        (500, ConnectionError, "failed \\(500\\). Look whether it took effect"),
        (504, ConnectionError, "failed \\(504\\). Look whether it took effect"),
        (413, RuntimeError, "takes no file of this size \\(413\\); save in smaller shards"),
        (412, RuntimeError, "someone else changed it in between \\(412\\)"),
        (401, PermissionError, "the token is missing or wrong \\(401\\)"),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(status, kind, says):
    with pytest.raises(kind, match=f"^cannot upload user/x: .*{says}") as raised, explained("upload", "user/x"):
        raise answer(status)
    assert raised.value.__cause__.response.status_code == status
    assert ("nothing of it is visible" in str(raised.value)) == (status == 429), "of a 5xx one cannot know"


def test_other_answers_pass_as_they_are():
    with pytest.raises(HfHubHTTPError, match="418"), explained("upload", "user/x"):
        raise answer(418)


def test_what_is_on_the_hub_and_what_on_this_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "dit").mkdir(parents=True)
    snapshot = "/home/me/.cache/huggingface/hub/models--lab--dit-xl/snapshots/ae23/transformer"
    assert cached(snapshot) == ("lab", "dit-xl") and named_on_hub(snapshot) == "lab/dit-xl"
    assert named_on_hub("lab/dit") == "lab/dit"
    assert all(named_on_hub(place) == "" for place in ("out/dit", str(tmp_path), "./x", "", "a/b/c"))
