# SPDX-License-Identifier: Apache-2.0
"""Loading from a Hub: statistics, private and gated repositories, and what is taken for one."""

from pathlib import Path

import pytest
from hub.server import Hub
from hub.snippets import LOAD, PICTURES, PUSH
from hub.users import Users

import diffusers_dq as dq
from diffusers_dq.repository import split_repository


def test_private(hub: Hub, users: Users, quantized, expected):
    users.does(
        "pipe = DiTPipeline.from_pretrained(htg)\n"
        'dq.push_to_hub(pipe, "user/secret", private=True, statistics=dq.Statistics.load(statistics))',
        **quantized,
    )
    assert hub.repositories["user/secret"].private
    assert users.does(LOAD, repo="user/secret") == expected
    users.forget()
    for token in (None, "read"):
        outcome = users.run('dq.Statistics.load("user/secret")', token=token)
        assert outcome.error == "FileNotFoundError" and "RepositoryNotFoundError" in outcome.causes
        assert "hf auth login" in outcome.message and "private" in outcome.message
        outcome = users.run(LOAD, token=token, repo="user/secret")
        assert outcome.error == "OSError" and "user/secret" in outcome.message
    outcome = users.run('dq.Statistics.load("user/secret")', token="expired")
    assert outcome.error == "PermissionError" and "missing or wrong (401)" in outcome.message
    hub.tokens["read"].add("user/secret")
    assert users.does(LOAD, token="read", repo="user/secret") == expected


def test_gated(hub: Hub, users: Users, quantized):
    users.does('dq.Statistics.load(statistics).push_to_hub("user/gated")', **quantized)
    hub.repositories["user/gated"].gated = True
    for token in (None, "read"):
        outcome = users.run('dq.Statistics.load("user/gated")', token=token)
        assert outcome.error == "PermissionError" and "GatedRepoError" in outcome.causes
        assert f"is gated. Ask for access on its page at {hub.url}/user/gated" in outcome.message


def test_statistics_from_a_repository(hub: Hub, users: Users, quantized, expected):
    users.does(
        """
statistics = dq.Statistics.load(statistics)
statistics.push_to_hub("user/statistics")
statistics.push_to_hub("user/statistics", revision="v2", filename="other.safetensors")
assert dq.Statistics.load("user/statistics").identity == statistics.identity
assert dq.Statistics.load("user/statistics@main").identity == statistics.identity
other = dq.Statistics.load("user/statistics", revision="v2", filename="other.safetensors")
assert other.identity == statistics.identity
""",
        **quantized,
    )
    assert list(hub.repositories["user/statistics"].files()) == [".gitattributes", "statistics.safetensors"]
    code = PICTURES + (
        "from diffusers import PipelineQuantizationConfig\n"
        'config = dq.DQConfig("htg", statistics="user/statistics")\n'
        'both = PipelineQuantizationConfig(quant_mapping={"transformer": config})\n'
        "result = digest(DiTPipeline.from_pretrained(full, quantization_config=both))\n"
        "pipe = DiTPipeline.from_pretrained(full)\n"
        'dq.quantize(pipe, dq.DQConfig("htg"), statistics="user/statistics@main", progress=False)\n'
        "assert digest(pipe) == result"
    )
    assert users.does(code, token=None, **quantized) == expected


def test_statistics_beside_a_model_are_no_part_of_it(hub: Hub, users: Users, quantized, expected):
    users.does(
        "pipe = DiTPipeline.from_pretrained(htg)\n"
        'dq.push_to_hub(pipe, "user/tiny", statistics=dq.Statistics.load(statistics))',
        **quantized,
    )
    assert users.does(LOAD, repo="user/tiny") == expected
    assert not hub.asked("GET", r"/resolve/.*/statistics\.safetensors")
    assert users.does('result = repr(dq.Statistics.load("user/tiny"))').startswith("Statistics(DiTTransformer2DModel")


def test_a_file_on_this_disk_comes_before_the_hub(hub: Hub, users: Users, quantized, tmp_path):
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "statistics").write_bytes(Path(quantized["statistics"]).read_bytes())
    code = 'import os\nos.chdir(folder)\nresult = repr(dq.Statistics.load("user/statistics"))'
    users.does(code, folder=str(tmp_path))
    assert hub.requests == []
    outcome = users.run(code.replace('statistics")', 'statistics", revision="v1")'), folder=str(tmp_path))
    assert outcome.error == "ValueError" and "is here, on this disk" in outcome.message


def test_where_statistics_were_looked_for_is_said(hub: Hub, users: Users, quantized):
    outcome = users.run('dq.Statistics.load("user/nothing")')
    assert outcome.error == "FileNotFoundError" and outcome.causes == ["RepositoryNotFoundError", "HTTPStatusError"]
    assert outcome.message.startswith("no statistics: there is no file user/nothing on this disk, and cannot download")
    users.does(PUSH, repo="user/tiny", **quantized)
    outcome = users.run('dq.Statistics.load("user/tiny")')
    assert (
        outcome.error == "FileNotFoundError" and "the repository has no file statistics.safetensors" in outcome.message
    )
    outcome = users.run('dq.Statistics.load("user/tiny@main", revision="v1")')
    assert outcome.error == "ValueError" and "give one of them" in outcome.message


@pytest.mark.parametrize(
    "source, known",
    [
        ("user/repo", ("user/repo", None)),
        ("user/re.po@refs/pr/1", ("user/re.po", "refs/pr/1")),
        ("out/statistics.safetensors", None),
        ("./out", None),
        ("~/out", None),
        ("/tmp/out", None),
        ("a/b/c", None),
        ("name", None),
        (Path("user/repo"), None),
    ],
)
def test_what_can_be_a_repository(source, known):
    assert split_repository(source) == known


def test_a_path_that_is_no_repository_is_not_looked_up():
    with pytest.raises(FileNotFoundError, match=r'nowhere\.safetensors; make one .*"user/repo@revision"'):
        dq.Statistics.load("out/nowhere.safetensors")
