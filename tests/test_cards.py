# SPDX-License-Identifier: Apache-2.0
"""What a card says, what it keeps of one that is there, and the cards of the demo models."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from diffusers import DiTPipeline
from huggingface_hub import ModelCard
from support import tiny_pipeline

import diffusers_dq as dq
from diffusers_dq.card_facts import recipe_source
from diffusers_dq.cards import Card, integers_of, make_card, read_card
from diffusers_dq.commands import doctor
from diffusers_dq.evaluation import Comparison
from diffusers_dq.hub import original

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "hub_cards"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", CARDS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipe(dit_folder, dit_statistics) -> DiTPipeline:
    pipe = DiTPipeline.from_pretrained(dit_folder)
    dq.quantize(pipe, dq.DQConfig("htg", weight_bits=4), statistics=dit_statistics, progress=False)
    return pipe


def comparison(psnr: float = 42.25) -> Comparison:
    return Comparison(
        images_reference=np.zeros((2, 4, 4, 3)),
        images_quantized=np.zeros((2, 4, 4, 3)),
        psnr=np.array([psnr, psnr + 1]),
        ssim=np.array([0.99, 0.97]),
        timesteps=np.array([800.0, 400.0, 0.0]),
        latent_snr=np.array([np.inf, 50.0, 41.5]),
        layer_snr={"a|b": np.array([20.0, 21.0, 22.0]), "c": np.array([10.0, np.nan, 12.0])},
        left_out={},
    )


def metadata_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


# What it says


def test_layers_and_reasons_are_those_of_the_report(pipe):
    report = dq.inspect(pipe)
    (part,) = make_card(pipe, "user/tiny").parts
    assert (part["quantized"], part["linears"]) == (len(report.quantized), len(report.linears))
    assert sum(layer["bytes"] for layer in part["layers"]) + part["kept_bytes"] == report.nbytes
    assert {layer["bits"]: layer["op"] for layer in part["layers"]}["W4A8"] == "linear_w4a8"
    assert {group["reason"] for group in part["kept"]} == set(report.kept.values())
    assert sum(group["count"] for group in part["kept"]) == len(report.kept)
    named = [name for group in part["kept"] for name in group["names"]]
    assert "transformer_blocks.*.norm1.emb.timestep_embedder.linear_1" in named and len(set(named)) == len(named)


def test_the_16_bit_size_is_that_of_the_original(pipe):
    """Embedders that blocks share count once, as files of this package hold them; the tiny model has them twice."""
    whole = tiny_pipeline().transformer
    shared = sum(parameter.numel() for parameter in whole.transformer_blocks[1].norm1.emb.parameters())
    (part,) = make_card(pipe, "user/tiny").parts
    assert part["bytes_16"] == 2 * (sum(parameter.numel() for parameter in whole.parameters()) - shared)


def test_figures_of_a_comparison(pipe):
    text = make_card(pipe, "user/tiny", comparison=comparison()).render()
    assert "2 pictures of the same seeds at 3 steps" in text
    assert "| PSNR, dB | 42.8 | 42.2 |" in text and "| SSIM | 0.9800 | 0.9700 |" in text
    assert "at the last step, dB | 41.5 |" in text and "`c` 11.0 dB, `a|b` 21.0 dB" in text
    assert "![full precision, quantized, and their difference](comparison/grid.png)" in text
    assert "| PSNR, dB | equal | equal |" in make_card(pipe, "u/t", comparison=comparison(np.inf)).render()
    assert "Not compared with the model in full precision" in make_card(pipe, "user/tiny").render()


def test_calibration_without_the_values_of_arguments(pipe, dit_statistics):
    card = make_card(pipe, "user/tiny", statistics={"transformer": dit_statistics})
    of_part = card.calibration["transformer"]
    assert (of_part["steps"], of_part["seed"], of_part["scheduler"]) == (10, 0, "DDIMScheduler")
    assert of_part["arguments"] == ["class_labels", "guidance_scale"]
    assert "| scheduler | `DDIMScheduler`, 10 steps, timesteps 900 to 0 |" in card.render()
    assert "was not recorded" in make_card(pipe, "user/tiny").render()


def test_statistics_of_another_model_are_refused(pipe, dit_statistics):
    foreign = replace(dit_statistics, about={**dit_statistics.about, "model_class": "FluxTransformer2DModel"})
    with pytest.raises(ValueError, match="are of a FluxTransformer2DModel, not DiTTransformer2DModel"):
        make_card(pipe, "user/tiny", statistics={"transformer": foreign})


@pytest.mark.parametrize(
    "config",
    [
        dq.DQConfig("htg", weight_bits=4),
        dq.DQConfig("rtn", activation_bits=16, modules_to_not_convert=[], group_size=32),
        dq.DQConfig(preset="quality", weight_bits=4, overrides={"*.ff.net.2": {"weight_bits": 8}}),
        dq.DQConfig("htg", guard_steps=(1, 2), groups=3),
    ],
)
def test_the_recipe_is_python_that_makes_the_configuration(config):
    assert eval(recipe_source(config), {"dq": dq}) == config


def test_tags_and_where_it_comes_from(pipe):
    base = {"license": "other", "license_name": "own", "base_model": "lab/original", "tags": ["theirs"]}
    found = metadata_of(make_card(pipe, "user/tiny", base=base, metadata={"tags": ["mine"]}).render())
    assert found["library_name"] == "diffusers" and found["pipeline_tag"] == "unconditional-image-generation"
    assert (found["base_model"], found["base_model_relation"]) == ("lab/original", "quantized")
    assert (found["license"], found["license_name"]) == ("other", "own")
    assert {"diffusers_dq", "quantized", "method:htg", "w4a8", "mine"} <= set(found["tags"])
    assert "theirs" not in found["tags"]


def test_what_is_not_known_is_left_out(pipe):
    text = make_card(pipe, "user/tiny").render()
    assert not {"license", "base_model", "base_model_relation"} & metadata_of(text).keys()
    assert "Not stated here. That of the original model applies" in text and "huggingface.co" not in text


@pytest.mark.parametrize(
    "call, reason",
    [
        ({"prompt": "x"}, "does not take"),
        ({"class_labels": {1}}, "literals"),
        ({"class_labels": [0], "guidance_scale": float("inf")}, "literals"),
    ],
)
def test_an_example_that_cannot_be_written_is_refused(pipe, call, reason):
    with pytest.raises(ValueError, match=reason):
        make_card(pipe, "user/tiny", call=call)


def test_what_multiplies_in_integers_is_said_by_layer(pipe, dit_folder):
    part = make_card(pipe, "user/tiny").parts[0]
    products = sum(layer["count"] for layer in part["layers"] if layer["bits"] == "W4A8")
    assert 0 < products < part["quantized"] < part["linears"]  # the tiny model has all three kinds
    text = make_card(pipe, "user/tiny").render()
    assert (
        f"weights of {part['quantized']} of its {part['linears']} linears are kept as integers; {products} of" in text
    )
    other = DiTPipeline.from_pretrained(dit_folder)
    dq.quantize(other, dq.DQConfig("rtn", activation_bits=16), progress=False)
    text = make_card(other, "user/tiny").render()
    assert "are kept as integers; all of them multiply in floating point." in text and "linear_w8a16" in text
    assert "| kernel |" in text and "runs on integers" not in text and "integer product" not in text


def test_integers_of_attention_and_of_integers_alone():
    layers = [{"op": "linear_w8a8", "count": 3}, {"op": "attention_int8", "count": 2}]
    assert integers_of([{"linears": 4, "quantized": 3, "layers": layers}]) == (
        "The weights of 3 of its 4 linears are kept as integers; all of them multiply in integers."
        " 2 attentions multiply in int8."
    )


def test_the_hardware_is_what_doctor_names(pipe):
    assert make_card(pipe, "user/tiny").hardware == doctor.name_of("cpu")


@pytest.mark.parametrize(
    "given, shown",
    [
        (
            ["lab/a", "lab/b"],
            "[lab/a](https://huggingface.co/lab/a) and [lab/b](https://huggingface.co/lab/b), quantized",
        ),
        (["lab/a"], "\n[lab/a](https://huggingface.co/lab/a), quantized"),
        ("a](x) <b>", "\na](x) &lt;b>, quantized"),
    ],
)
def test_originals(pipe, given, shown):
    for card, there in (
        (make_card(pipe, "user/tiny", base={"base_model": given}), None),
        (make_card(pipe, "user/tiny"), f"---\n{yaml.safe_dump({'base_model': given})}---\n"),
    ):
        assert shown in card.render(there)


@pytest.mark.parametrize(
    "metadata, shown",
    [
        ({"license": ["mit", "apache-2.0"]}, "mit, apache-2.0."),
        ({"license": "other", "license_name": "<!-- own", "license_link": "L\nM"}, "&lt;!-- own: L M."),
        ({"license": 2}, "2."),
    ],
)
def test_licences(pipe, metadata, shown):
    text = make_card(pipe, "user/tiny", base=metadata).render()
    assert (
        text.split("## Licence\n\n")[1].startswith(f"{shown}\n<!--")
        and metadata_of(text)["license"] == metadata["license"]
    )


# Names and texts that would be markup

EVIL = "x | `y` <b> {{ 7 * 7 }} {% raw %}\n---\nevil: 1\n```\n<!-- diffusers_dq: end -->"


def evil_card(pipe) -> Card:
    card = make_card(
        pipe,
        "user/tiny",
        comparison=replace(comparison(), layer_snr={EVIL: np.array([1.0])}),
        metadata={"owner": EVIL},
    )
    part = dict(card.parts[0])
    part["kept"] = [{"reason": EVIL, "count": 1, "names": [EVIL]}]
    part["notes"] = [{"reason": EVIL, "count": 1, "names": [EVIL]}]
    part["layers"] = [{"bits": EVIL, "activation": EVIL, "op": EVIL, "count": 1, "bytes": 1}]
    described = dict(model=EVIL, pipeline=EVIL, scheduler=EVIL, steps=2, calls=1, arguments=[EVIL], seed=0, dtype=EVIL)
    return replace(
        card,
        title=EVIL,
        hardware=EVIL,
        versions={EVIL: EVIL},
        parts=[part],
        calibration={"transformer": {**described, "timesteps": [1.0, 0.0]}},
    )


def test_texts_cannot_be_markup(pipe):
    card = evil_card(pipe)
    text = card.render()
    found, body = read_card(text)
    assert found["owner"] == EVIL and "evil" not in found and ModelCard(text).data.to_dict()["owner"] == EVIL
    assert body.count("<!--") == 2 and body.count(card.end) == 1 and "<b>" not in re.sub(r"`[^`\n]*`", "", body)
    assert "49" not in body.replace("{{ 7 * 7 }}", "") and body.count("{{ 7 * 7 }}") > 10  # rendered once, not twice
    assert body.count("\n```") == 4  # two blocks of code: none is ended from within
    for line in body.splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line)) - 1
            assert cells in (2, 3, 5), line  # of the tables of calibration, quality and layers
    assert card.render(text) == text


def test_a_table_shows_what_was_meant(pipe):
    card = make_card(pipe, "user/tiny")
    part = {**card.parts[0], "layers": [{"bits": "a|b\n<c>", "activation": "d", "op": "e|f", "count": 1, "bytes": 1}]}
    assert "| 1 | a\\|b &lt;c> | d | `e\\|f` | 1 |" in replace(card, parts=[part]).render()


def test_a_setting_cannot_end_the_section(pipe):
    config = dq.DQConfig("rtn", modules_to_not_convert=["<!-- diffusers_dq: end -->"])
    source = recipe_source(config)
    assert "<!--" not in source and eval(source, {"dq": dq}) == config


# Where it comes from, without a Hub


def test_a_folders_own_card(tmp_path, dit_folder):
    pipe = DiTPipeline.from_pretrained(dit_folder)
    pipe.save_pretrained(tmp_path)
    assert original(DiTPipeline.from_pretrained(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: lab/ancestor\n---\n")
    for loaded in (DiTPipeline.from_pretrained(tmp_path), DiTPipeline.from_pretrained(tmp_path).transformer):
        assert original(loaded) == {"license": "mit"}  # the ancestor is not what was quantized
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nbase_model: lab/original\nbase_model_relation: quantized\n---\n"
    )
    assert original(DiTPipeline.from_pretrained(tmp_path))["base_model"] == "lab/original"


# Beside what people wrote


def test_text_and_metadata_of_people_are_kept(pipe):
    card = make_card(pipe, "user/tiny", base={"license": "mit"})
    theirs = "---\nlicense: apache-2.0\ntags:\n- art\n- w8a8\nwidget:\n- text: x\n---\n# Mine\n\n| a |\n"
    text = card.render(theirs)
    found = metadata_of(text)
    assert found["license"] == "apache-2.0" and found["widget"] == [{"text": "x"}]
    assert found["tags"][0] == "art" and "w4a8" in found["tags"] and "w8a8" not in found["tags"]
    assert text.index("# Mine\n\n| a |\n") < text.index(card.begin)
    assert card.render(text) == text  # pushing again changes nothing
    assert text.rstrip().endswith(card.end) and "\napache-2.0.\n" in text


def test_what_is_given_stands_above_an_existing_card(pipe):
    card = make_card(pipe, "user/tiny", metadata={"license": "mit"})
    assert metadata_of(card.render("---\nlicense: apache-2.0\n---\n# Mine\n"))["license"] == "mit"


def test_sections_of_subfolders_stand_beside_each_other(pipe):
    first = make_card(pipe.transformer, "user/tiny", subfolder="a")
    second = make_card(pipe.transformer, "user/tiny", subfolder="b")
    both = second.render(first.render())
    assert both.count("diffusers_dq: begin") == 2 and 'subfolder="a"' in both and 'subfolder="b"' in both
    assert first.render(both) == both


def test_a_card_that_cannot_be_read_is_not_overwritten(pipe):
    with pytest.raises(ValueError, match=r"README\.md in user/tiny: its metadata cannot be read"):
        make_card(pipe, "user/tiny").render("---\nlicense: [mit\n---\n# Mine\n")


@pytest.mark.parametrize(
    "damage, counts",
    [
        (lambda text, card: text.replace(card.end, ""), "is there 1 times and .* 0 times"),
        (lambda text, card: text.replace(card.begin, ""), "is there 0 times and .* 1 times"),
        (lambda text, card: text + text[text.index(card.begin) :], "is there 2 times and .* 2 times"),
        (lambda text, card: text + card.end, "is there 1 times and .* 2 times"),
        (lambda text, card: text.replace(card.begin, "@").replace(card.end, card.begin).replace("@", card.end), "1 t"),
    ],
    ids=["no end", "no begin", "two of each", "two ends", "turned round"],
)
def test_damaged_markers_are_refused_and_nothing_is_lost(pipe, damage, counts):
    card = make_card(pipe, "user/tiny")
    text = damage(card.render("---\nlicense: mit\n---\n# Mine\n"), card) + "\nPEOPLE TEXT\n"
    with pytest.raises(ValueError, match=rf"README\.md in user/tiny: the markers .*{counts}.*remove both with"):
        card.render(text)


@pytest.mark.parametrize("tags, kept", [("[1, art]", ["1", "art"]), ("art", ["art"]), ("", []), ("[w8a8]", [])])
def test_tags_of_any_kind(pipe, tags, kept):
    found = metadata_of(make_card(pipe, "user/tiny").render(f"---\ntags: {tags}\n---\n# Mine\n"))["tags"]
    assert found == [*kept, "diffusers_dq", "quantized", "method:htg", "w4a8"]


def test_metadata_that_the_hubs_client_cannot_parse_is_kept(pipe):
    index = [{"name": "m", "results": "to come"}]
    theirs = f"---\n{yaml.safe_dump({'model-index': index, 'date': 2024})}---\n# Mine\n"
    found = metadata_of(make_card(pipe, "user/tiny").render(theirs))
    assert found["model-index"] == index and found["date"] == 2024


@pytest.mark.parametrize("text", ["", "---\n---\n", "\ufeff---\nlicense: mit\n---", "---\r\nlicense: mit\r\n---\r\n"])
def test_a_card_without_text(pipe, text):
    card = make_card(pipe, "user/tiny")
    assert card.render(text) == card.render("---\nlicense: mit\n---\n" if "mit" in text else None)


@pytest.mark.parametrize("text", ["---\n- a\n---\n", "---\ntext\n---\n", "---\n{}: }\n---\n"])
def test_metadata_that_is_no_mapping_is_refused(pipe, text):
    with pytest.raises(ValueError, match="metadata cannot be read"):
        make_card(pipe, "user/tiny").render(text)


def test_metadata_that_cannot_be_written_is_refused(pipe):
    with pytest.raises(ValueError, match="metadata must be texts"):
        make_card(pipe, "user/tiny", metadata={"owner": Path("x")}).render()


# The demo models' cards


def test_the_template_is_in_the_package_and_in_hub_cards():
    assert (CARDS / "template.md").resolve() == ROOT / "diffusers_dq" / "card_template.md"


@pytest.mark.parametrize("name", ["htg-w8a8", "htg-w4a8", "quality-w8a8", "quality-w4a8"])
def test_the_demo_cards_are_what_is_generated(generate, name):
    assert name in generate.RECIPES
    folder = generate.folder_of(name)
    assert (folder / "README.md").read_text(encoding="utf-8") == generate.rendered(name)
    assert (folder / generate.GRID).read_bytes().startswith(b"\x89PNG")


def test_every_demo_card_is_one_of_the_recipes(generate):
    assert {generate.folder_of(name) for name in generate.RECIPES} == set(CARDS.glob("dit-*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["htg-w4a8", "quality-w4a8"])
def test_a_demo_card_is_measured_again(generate, name):
    """Figures move with the machine's sums; what the recipe decides does not."""
    card, _ = generate.measured(name, generate.calibrated())
    known = Card(**json.loads((generate.folder_of(name) / "card.json").read_text(encoding="utf-8")))
    assert abs(float(card.comparison["psnr"]) - float(known.comparison["psnr"])) < 1.0
    for key in ("metadata", "call", "inputs", "returns", "parts", "calibration", "notes", "dtype", "grid"):
        assert getattr(card, key) == getattr(known, key)
