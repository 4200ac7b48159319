# SPDX-License-Identifier: Apache-2.0
"""Pushing to a Hub on loopback, by huggingface_hub's own client, each time in another process."""

import hashlib
from pathlib import Path

import pytest
from hub.server import Hub, Repository
from hub.snippets import LOAD, PICTURES, PUSH, WEIGHTS
from hub.users import Users


def test_a_pushed_pipeline_is_reloaded_bit_by_bit(hub: Hub, users: Users, quantized, expected):
    url = users.does(PUSH, repo="user/tiny", **quantized)
    repository = hub.repositories["user/tiny"]
    assert url == f"{hub.url}/user/tiny/commit/{repository.branches['main']}"
    assert repository.messages == ["initial commit", "Upload DiTPipeline, quantized by diffusers_dq"]
    saved = {str(file.relative_to(quantized["htg"])): file for file in Path(quantized["htg"]).rglob("*.safetensors")}
    for path, file in saved.items():
        assert repository.files()[path] == file.read_bytes()
    assert users.does(LOAD, token=None, repo="user/tiny") == expected


def test_weights_go_as_large_files_and_the_commit_names_them(hub: Hub, users: Users, quantized):
    users.does(PUSH, repo="user/tiny", **quantized)
    weights = hub.repositories["user/tiny"].files()[WEIGHTS]
    (put,) = hub.asked("PUT", hashlib.sha256(weights).hexdigest())
    assert int(put[2]["Content-Length"]) == len(weights)
    assert len(hub.asked("POST", "^/verify/")) == len(hub.asked("PUT", "^/lfs/")) == 2  # transformer and VAE
    (commit,) = hub.asked("POST", "/commit/")
    assert int(commit[2]["Content-Length"]) < len(weights)


def test_revisions(hub: Hub, users: Users, quantized, expected):
    users.does(PUSH, repo="user/tiny", **quantized)
    first = hub.repositories["user/tiny"].branches["main"]
    users.does(
        'result = str(dq.push_to_hub(DiTPipeline.from_pretrained(rtn), "user/tiny", revision="w4"))', **quantized
    )
    other = users.does(LOAD, repo=quantized["rtn"])
    assert other != expected
    by_revision = PICTURES + 'result = digest(DiTPipeline.from_pretrained("user/tiny", revision=revision))'
    assert users.does(by_revision, revision="w4") == other
    assert users.does(by_revision, revision="main") == users.does(by_revision, revision=first) == expected
    outcome = users.run('dq.Statistics.load("user/tiny@v9")')
    assert outcome.error == "FileNotFoundError" and "no branch, tag or commit 'v9'" in outcome.message
    assert "RevisionNotFoundError" in outcome.causes


def test_a_transformer_by_subfolder(hub: Hub, users: Users, quantized, expected):
    """Out of a pipeline, and pushed alone: to the top or to a subfolder."""
    users.does(PUSH, repo="user/tiny", **quantized)
    users.does(
        """
        transformer = DiTTransformer2DModel.from_pretrained(htg, subfolder="transformer")
        dq.push_to_hub(transformer, "user/alone")
        dq.push_to_hub(transformer, "user/sub", subfolder="parts/w8a8")
        """.replace("\n        ", "\n"),
        **quantized,
    )
    assert {"README.md", "parts/w8a8/config.json"} <= hub.repositories["user/sub"].files().keys()
    code = PICTURES + (
        "transformer = DiTTransformer2DModel.from_pretrained(repo, subfolder=subfolder)\n"
        "result = digest(DiTPipeline.from_pretrained(full, transformer=transformer))"
    )
    for repo, subfolder in (("user/tiny", "transformer"), ("user/alone", None), ("user/sub", "parts/w8a8")):
        assert users.does(code, repo=repo, subfolder=subfolder, **quantized) == expected


def test_a_pull_request_leaves_the_branch_alone(hub: Hub, users: Users, quantized):
    users.does(PUSH, repo="user/tiny", **quantized)
    before = hub.repositories["user/tiny"].branches["main"]
    users.does(
        """
from diffusers_dq import push_to_hub
result = push_to_hub(DiTPipeline.from_pretrained(rtn), "user/tiny", create_pr=True).pr_url
assert result.endswith("/discussions/1")
""",
        **quantized,
    )
    assert hub.repositories["user/tiny"].branches["main"] == before


def test_what_a_later_push_replaces_and_keeps(hub: Hub, users: Users, quantized):
    """Weights that a loader would take for its own are removed, in the same commit; text of people is kept."""
    users.does(PUSH, repo="user/tiny", **quantized)
    repository = hub.repositories["user/tiny"]
    of_an_index = {f"{part}/diffusion_pytorch_model.safetensors.index.json": b"{}" for part in ("transformer", "vae")}
    kept = {"notes.txt": b"mine", "vae/another.safetensors": b"mine"}
    stale = {**of_an_index, "vae/diffusion_pytorch_model-00001-of-00002.safetensors": b"half", **kept}
    card = repository.files()["README.md"].decode()
    assert "- w8a8\n" in card
    edited = card.replace("\n---\n", "\nlicense: mit\n---\nHand-written above.\n", 1) + "\nHand-written below.\n"
    repository.commit("main", {**repository.files(), **stale, "README.md": edited.encode()}, "by hand")
    users.does('dq.push_to_hub(DiTPipeline.from_pretrained(rtn), "user/tiny")', **quantized)
    files = repository.files()
    assert len(repository.messages) == 4
    assert not files.keys() & (stale.keys() - kept.keys()) and kept.items() <= files.items()
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "license: mit\n" in card and "- w4a8\n" in card and "- w8a8\n" not in card
    assert card.index("Hand-written above.") < card.index("diffusers_dq: begin") < card.index("Hand-written below.")
    assert card.count("diffusers_dq: begin") == 1 and "by `rtn`" in card and "by `htg`" not in card


@pytest.mark.parametrize(
    "token, says", [(None, "missing or wrong (401)"), ("read", "write access"), ("x", "wrong (401)")]
)
def test_who_may_not_push_is_told_what_to_do(hub: Hub, users: Users, quantized, token, says):
    outcome = users.run(PUSH, token=token, repo="user/tiny", **quantized)
    assert outcome.error == "PermissionError" and outcome.causes[0] == "HfHubHTTPError"
    assert says in outcome.message and hub.repositories == {}


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, users: Users, quantized):
    users.does(PUSH, repo="user/tiny", **quantized)
    before = hub.repositories["user/tiny"].branches["main"]
    outcome = users.run('dq.push_to_hub(DiTPipeline.from_pretrained(rtn), "user/tiny", private=True)', **quantized)
    assert outcome.error == "ValueError" and "there already and public; nothing was uploaded" in outcome.message
    assert hub.repositories["user/tiny"].branches["main"] == before


REFUSED = {
    "full": ("pipe = DiTPipeline.from_pretrained(full)", "nothing here is quantized by diffusers_dq"),
    "prepared": (
        "from diffusers import PipelineQuantizationConfig\n"
        'config = PipelineQuantizationConfig(quant_mapping={"transformer": dq.DQConfig("htg")})\n'
        "pipe = DiTPipeline.from_pretrained(full, quantization_config=config)",
        "prepared for 'htg' but not quantized",
    ),
    "adapter": (
        "from peft import LoraConfig, inject_adapter_in_model\n"
        "pipe = DiTPipeline.from_pretrained(rtn)\n"
        'inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), pipe.transformer)',
        "an adapter is loaded on transformer",
    ),
    "subfolder": (
        "pipe = DiTPipeline.from_pretrained(rtn)\nextra = dict(subfolder='here')",
        "subfolder='here' is for a transformer alone",
    ),
    "subfolder outside": (
        "pipe = DiTPipeline.from_pretrained(rtn).transformer\nextra = dict(subfolder='a/../../b')",
        "subfolder must be a folder inside the repository",
    ),
    "statistics": (
        "pipe = DiTPipeline.from_pretrained(rtn)\nextra = dict(statistics={'encoder': 1})",
        "statistics must be dq.Statistics by name of ['transformer'], got 'encoder'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_network(hub: Hub, users: Users, quantized, case):
    code, reason = REFUSED[case]
    push = 'dq.push_to_hub(pipe, "user/tiny", **globals().get("extra", {}))'
    outcome = users.run(f"{code}\n{push}", **quantized)
    assert outcome.error == "ValueError" and reason in outcome.message
    assert hub.requests == []


def test_nothing_says_where_on_this_disk_it_was(hub: Hub, users: Users, quantized, tmp_path):
    """Neither the model's folder nor that of the statistics, in any file; what is from the Hub stays named."""
    secret = tmp_path / "my secret folder"
    users.does(
        """
import os
os.makedirs(secret)
os.chdir(secret)
dq.Statistics.load(statistics).save("statistics.safetensors")
pipe = DiTPipeline.from_pretrained(full)
path = os.path.abspath("statistics.safetensors")
dq.quantize(pipe, dq.DQConfig("htg", statistics=path), progress=False)
pipe.save_pretrained("q")
assert full in open("q/transformer/config.json").read()  # else there is nothing to forget
pipe = DiTPipeline.from_pretrained("q")
dq.push_to_hub(pipe, "user/tiny", statistics=dq.Statistics.load(path))
pipe = DiTPipeline.from_pretrained("user/tiny")
dq.push_to_hub(pipe, "user/again")
""",
        secret=str(secret),
        **quantized,
    )
    for name in ("user/tiny", "user/again"):
        for path, content in hub.repositories[name].files().items():
            for place in (str(secret), quantized["full"], str(users.home), '_name_or_path": "q', "secret"):
                assert place.encode() not in content, (name, path, place)
    assert b'"_name_or_path": "user/tiny"' in hub.repositories["user/again"].files()["transformer/config.json"]


def test_prompts_in_statistics_are_told_of(hub: Hub, users: Users, quantized):
    outcome = users.run(
        """
from dataclasses import replace
found = dq.Statistics.load(statistics)
private = replace(found, about={**found.about, "arguments": [{"prompt": "'my house'"}]})
pipe = DiTPipeline.from_pretrained(htg)
dq.push_to_hub(pipe, "user/none", statistics=private, upload_statistics=False)
dq.push_to_hub(pipe, "user/classes", statistics=found)
print("until here nothing")
dq.push_to_hub(pipe, "user/all", statistics=private)
""",
        **quantized,
    )
    assert outcome.error == "", outcome.log
    before, after = outcome.log.split("until here nothing")
    assert "statistics that go to" not in before
    assert "statistics that go to user/all hold prompt of 1 calibrated calls" in after
    described = hub.repositories["user/none"].files()
    assert "statistics.safetensors" not in described and not any(b"my house" in text for text in described.values())
    assert b"| calls | " in described["README.md"] and b"with `prompt`" in described["README.md"]
    assert b"my house" in hub.repositories["user/all"].files()["statistics.safetensors"]


def test_two_denoisers_have_statistics_of_their_own(hub: Hub, users: Users):
    tests = str(Path(__file__).parents[1])
    users.does(
        """
import sys
sys.path.insert(0, tests)
from test_two_denoisers import CALL, build
pipe = build()
statistics = {
    name: dq.calibrate(pipe, [CALL], num_inference_steps=4, component=name, progress=False)
    for name in ("transformer", "transformer_2")
}
for name, found in statistics.items():
    dq.quantize(pipe, dq.DQConfig("htg"), statistics=found, component=name, progress=False)
try:
    dq.push_to_hub(pipe, "user/wan", statistics=statistics["transformer"])
except ValueError as error:
    assert "have statistics of their own: give a dict of them by name" in str(error)
dq.push_to_hub(pipe, "user/wan", statistics=statistics)
dq.push_to_hub(pipe, "user/one", statistics={"transformer_2": statistics["transformer_2"]})
""",
        tests=tests,
    )
    there = {name for name in hub.repositories["user/wan"].files() if name.startswith("statistics")}
    assert there == {"statistics-transformer.safetensors", "statistics-transformer_2.safetensors"}
    assert "statistics-transformer_2.safetensors" in hub.repositories["user/one"].files()
    card = hub.repositories["user/wan"].files()["README.md"].decode()
    assert "## `transformer`: Recipe" in card and "## `transformer_2`: Recipe" in card
    assert 'export_to_video(output.frames[0], "video.mp4")' in card and "pipeline_tag: text-to-video" in card


# The command

COMMAND = """
from diffusers_dq.cli import app
import numpy
from diffusers_dq.evaluation import paired
paired.ssim = lambda x, y: numpy.ones(len(x))  # the tiny model's pictures are smaller than its window
compared = []
real = dq.compare
dq.compare = lambda *given, **more: compared.append(more) or (real(*given, **more) if may_compare else 1 / 0)
try:
    app(["push", *map(str, arguments)], standalone_mode=False)
finally:
    print("compared:", len(compared))
"""


@pytest.mark.parametrize(
    "token, more, says",
    [
        (None, [], "no token was found"),
        ("read", [], "may only read"),
        ("expired", [], "missing or wrong (401)"),
        ("write", ["--statistics", "nowhere.safetensors"], "nowhere.safetensors"),
        ("write", ["--statistics-2", "{statistics}"], "--statistics-2 is of transformer_2, which DiTPipeline has not"),
        ("write", ["--argument", "no_such=1"], "call sets no_such, which DiTPipeline does not take"),
    ],
)
def test_what_will_be_refused_is_refused_before_comparing(hub: Hub, users: Users, quantized, token, more, says):
    arguments = [quantized["rtn"], "user/tiny", "--compare-with", quantized["full"], "--class-labels", "1,2"]
    arguments += [part.format(**quantized) for part in more]
    outcome = users.run(COMMAND, token=token, arguments=arguments, may_compare=False)
    assert says in outcome.message + outcome.log and "compared: 0" in outcome.log and hub.repositories == {}
    assert "ZeroDivisionError" not in outcome.log


def test_a_card_that_has_to_be_mended_is_told_before_comparing(hub: Hub, users: Users, quantized):
    users.does(PUSH, repo="user/tiny", **quantized)
    repository = hub.repositories["user/tiny"]
    card = repository.files()["README.md"].replace(b"<!-- diffusers_dq: end -->", b"")
    repository.commit("main", {**repository.files(), "README.md": card}, "by hand")
    arguments = [quantized["rtn"], "user/tiny", "--compare-with", quantized["full"], "--class-labels", "1,2"]
    outcome = users.run(COMMAND, arguments=arguments, may_compare=False)
    assert "are damaged" in outcome.message + outcome.log and "compared: 0" in outcome.log


def test_the_commands_refusals_without_a_token_come_before_the_model_is_compared(hub: Hub, users: Users, quantized):
    outcome = users.run(COMMAND, arguments=[quantized["full"], "user/tiny"], may_compare=False)
    assert "nothing here is quantized by diffusers_dq" in outcome.message + outcome.log
    assert hub.requests == []


def test_the_example_of_the_command_is_what_was_compared(hub: Hub, users: Users, quantized):
    """With statistics from the Hub and the licence of the reference."""
    users.does('dq.Statistics.load(statistics).push_to_hub("user/statistics")', **quantized)
    files = {str(f.relative_to(quantized["full"])): f.read_bytes() for f in Path(quantized["full"]).rglob("*.*")}
    hub.repositories["lab/base"] = Repository()
    hub.repositories["lab/base"].commit("main", {**files, "README.md": b"---\nlicense: mit\n---\n"}, "base")
    arguments = [quantized["htg"], "user/tiny", "--compare-with", "lab/base", "--class-labels", "1-3", "--batch", 2]
    arguments += ["--guidance", 1.5, "--steps", 3, "--statistics", "user/statistics@main", "--describe-statistics"]
    outcome = users.run(COMMAND, arguments=arguments, may_compare=True)
    assert "pushed: " in outcome.log and "pushing to user/tiny as user" in outcome.log, outcome.log
    uploaded = hub.repositories["user/tiny"].files()
    card = uploaded["README.md"].decode()
    assert "pipe(class_labels=[1, 2], guidance_scale=1.5, num_inference_steps=3, generator=" in card
    assert "3 pictures of the same seeds at 3 steps" in card and "| calls | " in card
    assert "base_model: lab/base\n" in card and "license: mit\n" in card
    assert "statistics.safetensors" not in uploaded
