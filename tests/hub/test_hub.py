# SPDX-License-Identifier: Apache-2.0
"""Pushing to and loading from a Hub on loopback, by huggingface_hub's own client, each time in another process."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub.server import Hub, Repository
from hub.users import Users, environment_of
from huggingface_hub.errors import HTTPError  # the base of its client's own

import diffusers_dq as dq
from diffusers_dq.repository import explained, split_repository

PUSH = """
pipe = DiTPipeline.from_pretrained(htg)
result = str(dq.push_to_hub(pipe, repo))
"""
PICTURES = """
import hashlib
def digest(pipe):
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=3, guidance_scale=1.5, output_type="np")
    images = pipe([1, 2], generator=torch.manual_seed(0), **call).images
    return hashlib.sha256(images.tobytes()).hexdigest()
"""
LOAD = PICTURES + "result = digest(DiTPipeline.from_pretrained(repo))"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def expected(users: Users, quantized: dict[str, str]) -> str:
    """Of pictures that the saved pipeline makes without a Hub."""
    return users.does(LOAD, repo=quantized["htg"])


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
    stale = {"transformer/diffusion_pytorch_model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    card = repository.files()["README.md"].decode()
    assert "- w8a8\n" in card
    edited = card.replace("\n---\n", "\nlicense: mit\n---\nHand-written above.\n", 1) + "\nHand-written below.\n"
    repository.commit("main", {**repository.files(), **stale, "README.md": edited.encode()}, "by hand")
    users.does('dq.push_to_hub(DiTPipeline.from_pretrained(rtn), "user/tiny")', **quantized)
    files = repository.files()
    assert len(repository.messages) == 4
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" not in files and files["notes.txt"] == b"mine"
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "license: mit\n" in card and "- w4a8\n" in card and "- w8a8\n" not in card
    assert card.index("Hand-written above.") < card.index("diffusers_dq: begin") < card.index("Hand-written below.")
    assert card.count("diffusers_dq: begin") == 1 and "by `rtn`" in card and "by `htg`" not in card


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


# Interruptions


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


# Statistics


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


# Without a server


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


# Cards


def code_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_the_code_of_a_card_runs(hub: Hub, users: Users, quantized, tmp_path):
    """In an interpreter of its own, and what it saves is the picture."""
    call = dict(class_labels=[1], num_inference_steps=2)
    users.does("dq.push_to_hub(DiTPipeline.from_pretrained(htg), 'user/tiny', call=call)", call=call, **quantized)
    usage, recipe = code_of(hub.repositories["user/tiny"].files()["README.md"].decode())
    environment = {**os.environ, **environment_of(hub.url, users.home)}
    subprocess.run([sys.executable, "-c", usage], cwd=tmp_path, env=environment, check=True, timeout=300)
    users.does(
        """
pipe = DiTPipeline.from_pretrained(htg)
pipe([1], num_inference_steps=2, generator=torch.manual_seed(0)).images[0].save(f"{folder}/expected.png")
exec(recipe)
assert config == pipe.transformer.hf_quantizer.quantization_config.copy(result=None)
""",
        folder=str(tmp_path),
        recipe=recipe,
        **quantized,
    )
    assert (tmp_path / "image.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_the_code_of_a_transformers_card_runs(hub: Hub, users: Users, quantized):
    users.does(
        'transformer = DiTTransformer2DModel.from_pretrained(htg, subfolder="transformer")\n'
        'dq.push_to_hub(transformer, "user/sub", subfolder="w8a8")',
        **quantized,
    )
    usage, _ = code_of(hub.repositories["user/sub"].files()["README.md"].decode())
    assert 'subfolder="w8a8"' in usage
    users.does(usage + "assert transformer.is_quantized", token=None)


def test_the_pictures_of_a_comparison_are_beside_the_card(hub: Hub, users: Users, quantized):
    users.does(
        """
import numpy as np
pictures, steps = np.zeros((2, 16, 16, 3)), np.array([8.0, 4.0, 0.0])
comparison = dq.Comparison(
    images_reference=pictures, images_quantized=pictures + 0.01, psnr=np.array([40.0, 40.0]), ssim=np.ones(2),
    timesteps=steps, latent_snr=steps, layer_snr={"proj": steps}, left_out={},
)
pipe = DiTPipeline.from_pretrained(htg)
dq.push_to_hub(pipe, "user/tiny", comparison=comparison)
""",
        **quantized,
    )
    files = hub.repositories["user/tiny"].files()
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", files["README.md"].decode())
    assert files[picture].startswith(b"\x89PNG") and b'"mean_psnr"' in files["comparison/comparison.json"]


def test_licence_and_original_are_taken_over(hub: Hub, users: Users, quantized):
    """From the card of where it was loaded; of a quantized model that is pushed on, its original's."""
    files = {str(f.relative_to(quantized["full"])): f.read_bytes() for f in Path(quantized["full"]).rglob("*.*")}
    base = Repository()
    hub.repositories["lab/base"] = base
    card = b"---\nlicense: other\nlicense_name: lab\nlicense_link: LICENSE.md\n---\n# Base\n"
    base.commit("main", {**files, "README.md": card}, "base")
    users.does(
        """
pipe = DiTPipeline.from_pretrained("lab/base")
dq.quantize(pipe, dq.DQConfig("rtn"), progress=False)
dq.push_to_hub(pipe, "user/first")
dq.push_to_hub(pipe.transformer, "user/alone")
dq.push_to_hub(DiTPipeline.from_pretrained("user/first"), "user/second")
dq.push_to_hub(DiTPipeline.from_pretrained("user/first"), "user/third", base_model="lab/base", license="mit")
"""
    )
    for repo, licence in (("first", "other"), ("alone", "other"), ("second", "other"), ("third", "mit")):
        text = hub.repositories[f"user/{repo}"].files()["README.md"].decode()
        assert "base_model: lab/base\n" in text and "base_model_relation: quantized\n" in text
        assert f"license: {licence}\n" in text
    first = hub.repositories["user/first"].files()["README.md"].decode()
    assert "license_link: https://huggingface.co/lab/base/blob/main/LICENSE.md\n" in first


def test_an_original_that_nobody_knows_is_not_invented(hub: Hub, users: Users, quantized):
    """A folder of the name of a repository, which is gone by the time of pushing."""
    outcome = users.run(
        """
pipe = DiTPipeline.from_pretrained(htg)
pipe.register_to_config(_name_or_path="out/pipeline")
dq.push_to_hub(pipe, "user/tiny")
""",
        **quantized,
    )
    assert outcome.error == "" and "says no base_model: none is known" in outcome.log
    assert "base_model" not in hub.repositories["user/tiny"].files()["README.md"].decode()
