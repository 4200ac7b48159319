# SPDX-License-Identifier: Apache-2.0
"""Model cards: what is known of a quantized model (card_facts.py), rendered from card_template.md and merged into the
card that is there.

A card has two parts: metadata, a YAML block of which keys that are there stand unless given anew, and a section
between two markers, which is replaced as a whole; all other text is people's own.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

import jinja2
import yaml
from diffusers import DiffusionPipeline

from diffusers_dq.card_facts import calibration_of, check_publishable, comparison_of, library_of, machine, part_of
from diffusers_dq.evaluation import Comparison
from diffusers_dq.statistics import Statistics
from diffusers_dq.usage import example, loading, pipeline_code, pipeline_tag, saved_as, transformer_code

TEMPLATE = "card_template.md"
GRID = "comparison/grid.png"
_OUR_TAG = re.compile(r"diffusers_dq|w\d+a\d+|method:\w+")
_ONE_OF_EACH = ("license", "license_name", "license_link", "language", "pipeline_tag")  # that a derived model shares
_FRONT_MATTER = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_INTEGER_PRODUCTS = ("linear_w8a8", "linear_w4a8", "linear_grouped")


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that a card says, JSON-able: `Card(**json.loads(...))` renders the same text anywhere.

    title: heading.   repo_id, revision, subfolder: where the model is loaded from; revision "" is the main branch.
    metadata: of the YAML block.   pipeline: its class, "" for a transformer alone.
    library: the module that has the class.   call, inputs: of the example (`usage.example`).
    returns: how its output is saved (`usage.saved_as`).
    dtype: of what is not quantized.   parts: one dict a quantized transformer (`part_of`).
    given: keys of the metadata that stand whatever an existing card says.
    calibration: of `calibration_of`, by part.   comparison: of `comparison_of`.   grid: path of a picture of it.
    hardware, versions: of the machine that made the card.   notes: paragraphs to end the introduction with.
    """

    title: str
    repo_id: str
    revision: str = ""
    subfolder: str = ""
    metadata: Mapping[str, Any]
    given: list[str] = field(default_factory=list)
    pipeline: str
    library: str
    call: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    returns: str = "images"
    dtype: str
    parts: list[dict[str, Any]]
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    grid: str = ""
    hardware: str
    versions: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def begin(self) -> str:
        return f"<!-- diffusers_dq: begin {self.subfolder}".rstrip() + " -->"

    @property
    def end(self) -> str:
        return f"<!-- diffusers_dq: end {self.subfolder}".rstrip() + " -->"

    def render(self, existing: str | None = None) -> str:
        """The README.md. What people wrote into an existing one is kept: all text but what stands between the markers
        of this card, which is put at the end where there are none yet, and of the metadata every key that is there;
        of tags, ours are replaced.

        Raises ValueError where the metadata of the existing one cannot be read, and where it is not clear what stands
        between the markers.
        """
        try:
            theirs, text = read_card(existing or "")
        except ValueError as error:
            raise ValueError(
                f"the README.md in {self.repo_id}: {error}. Correct it on the Hub, or remove it, and push again"
            ) from error
        theirs = {key: value for key, value in theirs.items() if key not in self.given}
        ours = self.metadata["tags"]
        own = [tag for tag in _texts(theirs.get("tags")) if tag not in ours and not _OUR_TAG.fullmatch(tag)]
        merged = {**self.metadata, **theirs, "tags": list(dict.fromkeys([*own, *ours]))}
        section = self._section(merged)
        try:
            front = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
        except yaml.YAMLError as error:
            raise ValueError(f"metadata must be texts, numbers, and lists and mappings of them ({error})") from error
        return f"---\n{front}---\n" + (self._placed(text, section) if text.strip() else f"\n{section}\n")

    def _placed(self, text: str, section: str) -> str:
        begins, ends = text.count(self.begin), text.count(self.end)
        if not begins and not ends:
            return f"{text.rstrip()}\n\n{section}\n"
        start, stop = text.find(self.begin), text.find(self.end)
        if (begins, ends) != (1, 1) or stop < start:
            raise ValueError(
                f"the README.md in {self.repo_id}: the markers of what diffusers_dq writes are damaged, {self.begin!r}"
                f" is there {begins} times and {self.end!r} {ends} times, expected each once, in this order. Restore"
                " them, or remove both with what is between them, and push again; nothing was changed"
            )
        return text[:start] + section + text[stop + len(self.end) :]

    def _section(self, metadata: Mapping[str, Any]) -> str:
        template = jinja2.Template(
            (files("diffusers_dq") / TEMPLATE).read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined
        )
        arguments = loading(self.repo_id, revision=self.revision, subfolder=self.subfolder, dtype=self.dtype)
        if self.pipeline:
            code = pipeline_code(self.library, self.pipeline, arguments, self.call, self.inputs, self.returns)
        else:
            code = transformer_code(self.library, str(self.parts[0]["class"]), arguments)
        body = template.render(
            **self.to_dict() | {"metadata": metadata},
            usage=code,
            integers=integers_of(self.parts),
            originals=[_link(name) for name in _texts(metadata.get("base_model"))],
            licence=", ".join(map(_cell, _texts(metadata.get("license_name") or metadata.get("license")))),
            licence_link=_cell(metadata.get("license_link") or ""),
            text=_cell,
            code=_code,
            code_cell=_code_cell,
        )
        return f"{self.begin}\n\n{body.strip()}\n{self.end}"


def read_card(text: str) -> tuple[dict[str, Any], str]:
    """(metadata, the text below it) of a README.md.   Raises ValueError where the metadata cannot be read."""
    found = _FRONT_MATTER.match(text)
    if found is None:
        return {}, text
    try:
        metadata = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"its metadata cannot be read ({error})") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"its metadata cannot be read (a mapping is expected, it is a {type(metadata).__name__})")
    return metadata or {}, text[found.end() :]


def integers_of(parts: list[dict[str, Any]]) -> str:
    """What of the arithmetic is done in integers, a sentence or two."""
    linears = sum(part["linears"] for part in parts)
    stored = sum(part["quantized"] for part in parts)
    counts: Counter[str] = Counter()
    for layer in (layer for part in parts for layer in part["layers"]):
        counts[layer["op"]] += layer["count"]
    products = sum(counts[op] for op in _INTEGER_PRODUCTS)
    kept = f"The weights of {stored} of its {linears} linears are kept as integers"
    if products in (0, stored):
        how = f"all of them multiply in {'integers' if products else 'floating point'}"
    else:
        how = f"{products} of them multiply in integers, the others in floating point"
    attention = f". {counts['attention_int8']} attentions multiply in int8" if counts["attention_int8"] else ""
    return f"{kept}; {how}{attention}."


def make_card(
    pipe_or_transformer: Any,
    repo_id: str,
    *,
    comparison: Comparison | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    call: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    file_bytes: Mapping[str, int] | None = None,
    revision: str = "",
    subfolder: str = "",
) -> Card:
    """Of a quantized pipeline or transformer; nothing is written and no network used.

    statistics: by part ("transformer", "transformer_2"), what it was calibrated on.   call: keyword arguments of the
        example (`usage.example`); None: a prompt, or the first class.   revision: that the example loads.
    base: metadata of the original's card, of which licence, language and kind of pipeline are taken over; with
        "base_model" its id on the Hub.   metadata: what is to stand in the card whatever else is known.
    file_bytes: of each part's weights as saved.

    Raises ValueError for a model that is not quantized (`check_publishable`), for statistics of another model, for a
    call that cannot be written down.
    """
    parts = check_publishable(pipe_or_transformer)
    pipe = pipe_or_transformer if isinstance(pipe_or_transformer, DiffusionPipeline) else None
    shown = type(pipe) if pipe is not None else type(next(iter(parts.values())))
    literals, inputs = ({}, {}) if pipe is None else example(shown, call)
    described = [part_of(name, model, (file_bytes or {}).get(name)) for name, model in parts.items()]
    for name, of_part in (statistics or {}).items():
        known = type(parts[name]).__name__ if name in parts else None
        if of_part.about.get("model_class") != known:
            raise ValueError(
                f"the statistics given for {name} are of a {of_part.about.get('model_class')}, not {known}"
            )
    model = next(iter(parts.values()))
    return Card(
        title=repo_id.rpartition("/")[2],
        repo_id=repo_id,
        revision=revision,
        subfolder=subfolder,
        metadata=_metadata(described, None if pipe is None else pipeline_tag(shown), base or {}, metadata or {}),
        given=[key for key in metadata or {} if key != "tags"],
        pipeline="" if pipe is None else type(pipe).__name__,
        library=library_of(shown),
        call=literals,
        inputs=inputs,
        returns="" if pipe is None else saved_as(shown),
        dtype=str(model.dtype).removeprefix("torch."),
        parts=described,
        calibration={name: calibration_of(of_part) for name, of_part in (statistics or {}).items()},
        comparison=None if comparison is None else comparison_of(comparison),
        grid="" if comparison is None else f"{subfolder}/{GRID}".lstrip("/"),
        **machine(model.device),
    )


def _metadata(
    parts: list[dict[str, Any]], tag: str | None, base: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    taken = {key: base[key] for key in _ONE_OF_EACH if base.get(key) is not None}
    base_model = given.get("base_model", base.get("base_model"))
    if isinstance(base_model, list | tuple) and len(base_model) == 1:
        base_model = base_model[0]
    methods = [f"method:{part['method']}" for part in parts]
    tags = ["diffusers_dq", "quantized", *methods, *(bits.lower() for part in parts for bits in part["bits"][:1])]
    known = {
        **taken,
        "library_name": "diffusers",
        "base_model": base_model,
        "base_model_relation": None if base_model is None else "quantized",
        "pipeline_tag": tag or taken.get("pipeline_tag"),
    }
    merged = {**known, **given, "tags": list(dict.fromkeys([*tags, *_texts(given.get("tags"))]))}
    return {key: value for key, value in merged.items() if value is not None}


def _texts(value: Any) -> list[str]:
    """Of metadata that may be one, a list, numbers, or not there."""
    if value is None:
        return []
    return [str(part) for part in value] if isinstance(value, list | tuple) else [str(value)]


def _link(repo_id: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{repo_id})" if _REPOSITORY.fullmatch(repo_id) else _cell(repo_id)


def _cell(text: Any) -> str:
    """For a line of Markdown or a cell of its tables: no markup of HTML, no new line or cell."""
    return " ".join(str(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())


def _code(text: Any) -> str:
    """A code span: nothing ends it, and no comment begins in it."""
    return "`" + " ".join(str(text).replace("`", "'").replace("<!--", "<! --").split()) + "`"


def _code_cell(text: Any) -> str:
    return _code(text).replace("|", "\\|")
