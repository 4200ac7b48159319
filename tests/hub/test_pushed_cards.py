# SPDX-License-Identifier: Apache-2.0
"""The card that a push writes: its code runs, and it knows where the model comes from."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub.server import Hub, Repository
from hub.snippets import PICTURES
from hub.users import Users, environment_of


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


def test_the_code_of_a_branchs_card_loads_the_branch(hub: Hub, users: Users, quantized):
    """Another model is on main, which the code would load without a revision."""
    users.does(
        """
dq.push_to_hub(DiTPipeline.from_pretrained(htg), "user/tiny")
dq.push_to_hub(DiTPipeline.from_pretrained(rtn), "user/tiny", revision="w4")
transformer = DiTPipeline.from_pretrained(rtn).transformer
dq.push_to_hub(transformer, "user/alone", revision="w4")
""",
        **quantized,
    )
    repository = hub.repositories["user/tiny"]
    load = "pipe = DiTPipeline.from_pretrained({})"
    found = {}
    for branch in ("main", "w4"):
        usage, _ = code_of(repository.files(branch)["README.md"].decode())
        (line,) = [line for line in usage.splitlines() if line.startswith("pipe = ")]
        assert ('revision="w4"' in line) == (branch == "w4")
        found[branch] = users.does(f"{PICTURES}{line}\nresult = digest(pipe)", token=None)
    for branch, folder in (("main", "htg"), ("w4", "rtn")):
        assert found[branch] == users.does(
            PICTURES + load.format("folder") + "\nresult = digest(pipe)", folder=quantized[folder]
        )
    alone = hub.repositories["user/alone"]
    usage, _ = code_of(alone.files("w4")["README.md"].decode())
    users.does(usage + "assert transformer.is_quantized", token=None)


@pytest.mark.parametrize("given", ['revision="main"', "create_pr=True"])
def test_the_code_of_a_pull_requests_card_loads_what_it_is_for(hub: Hub, users: Users, quantized, given):
    users.does('dq.push_to_hub(DiTPipeline.from_pretrained(htg), "user/tiny")', **quantized)
    before = set(hub.repositories["user/tiny"].commits)
    users.does(f'dq.push_to_hub(DiTPipeline.from_pretrained(rtn), "user/tiny", {given})', **quantized)
    (made,) = set(hub.repositories["user/tiny"].commits) - before
    card = hub.repositories["user/tiny"].commits[made]["README.md"].decode()
    assert "by `rtn`" in card and 'pipe = DiTPipeline.from_pretrained("user/tiny")\n' in card


def test_a_damaged_card_is_told_before_anything_is_uploaded(hub: Hub, users: Users, quantized):
    push = 'dq.push_to_hub(DiTPipeline.from_pretrained(rtn), "user/tiny")'
    users.does(push, **quantized)
    repository = hub.repositories["user/tiny"]
    card = repository.files()["README.md"].replace(b"<!-- diffusers_dq: end -->", b"") + b"\nPEOPLE TEXT\n"
    before = repository.commit("main", {**repository.files(), "README.md": card}, "by hand")
    outcome = users.run(push, **quantized)
    assert outcome.error == "ValueError" and "markers of what diffusers_dq writes are damaged" in outcome.message
    assert repository.branches["main"] == before and repository.files()["README.md"] == card


def test_a_model_that_was_quantized_into_a_folder_knows_its_original(hub: Hub, users: Users, quantized, tmp_path):
    """As the commands do: quantize lab/base into a folder, push the folder."""
    files = {str(f.relative_to(quantized["full"])): f.read_bytes() for f in Path(quantized["full"]).rglob("*.*")}
    base = Repository()
    hub.repositories["lab/base"] = base
    base.commit("main", {**files, "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n# Base\n"}, "base")
    users.does(
        """
pipe = DiTPipeline.from_pretrained("lab/base")
dq.quantize(pipe, dq.DQConfig("rtn"), progress=False)
pipe.save_pretrained(folder)
dq.push_to_hub(DiTPipeline.from_pretrained(folder), "user/pipeline")
dq.push_to_hub(DiTPipeline.from_pretrained(folder).transformer, "user/transformer")
DiTPipeline.from_pretrained(folder).save_pretrained(folder + "/again")
dq.push_to_hub(DiTPipeline.from_pretrained(folder + "/again"), "user/again")
full = DiTPipeline.from_pretrained("lab/base")
full.save_pretrained(folder + "/full")
tuned = DiTPipeline.from_pretrained(folder + "/full")
dq.quantize(tuned, dq.DQConfig("rtn"), progress=False)
dq.push_to_hub(tuned, "user/tuned")
""",
        folder=str(tmp_path / "q"),
    )
    for name in ("pipeline", "transformer", "again"):
        text = hub.repositories[f"user/{name}"].files()["README.md"].decode()
        assert "base_model: lab/base\n" in text and "license: cc-by-nc-4.0\n" in text
    tuned = hub.repositories["user/tuned"].files()["README.md"].decode()
    assert "base_model" not in tuned  # a folder in full precision may hold other weights than what it began as
