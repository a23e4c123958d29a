"""An adapter's model card: the README.md that the hub shows, and people read.

It says what the adapter is for, what it stores and how it is loaded. It is made of the adapter alone, so that the same
adapter has the same card, and names no path of this machine. A README.md without its mark is somebody's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from vblora.files.content import Content, form_of
from vblora.io import replacing

CARD_FILE = "README.md"
MARK = "<!-- Written by vblora, and anew with every save. Without this line it is yours, and left as it is. -->"
PLACE = "FOLDER-OR-NAME-ON-THE-HUB"  # of the adapter, in the code of a card; `at` puts the name in
BASE = "FOLDER-OF-THE-BASE-MODEL"  # where it has no name on the hub
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
# By PEFT's type of task: transformers' class, and the hub's name of the task.
CLASSES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
}
METHODS = {
    "vblora": "VB-LoRA ([arXiv 2405.15179](https://arxiv.org/abs/2405.15179))",
    "tied_lora": "Tied-LoRA ([arXiv 2311.09578](https://arxiv.org/abs/2311.09578))",
    "lora_xs": "LoRA-XS ([arXiv 2405.17604](https://arxiv.org/abs/2405.17604))",
}


def card_of(content: Content, is_peft: bool) -> str:
    """The card of an adapter whose directory is in PEFT's format, or in our own."""
    base = hub_name(content.base_model)
    return "\n".join(
        [*_front(content, base, is_peft), "", MARK, "", *_table(content, base), "", *_code(content, is_peft)]
    )


def hub_name(base_model: str | None) -> str | None:
    """The base model's name on the hub, where it is one and no path here."""
    known = base_model is not None and HUB_NAME.fullmatch(base_model) and not Path(base_model).exists()
    return base_model if known else None


def at(card: str, repository: str, revision: str | None, subfolder: str | None) -> str:
    """The card with the place on the hub from which its code loads the adapter."""
    more = "".join(f", {name}={json.dumps(v)}" for name, v in (("revision", revision), ("subfolder", subfolder)) if v)
    return card.replace(json.dumps(PLACE), json.dumps(repository) + more)


def is_foreign(path: Path) -> bool:
    """Whether there is a card that somebody else wrote.

    Raises:
        ValueError: a folder is in its place.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, where the model card is to be written: move it, or save with card=False")
    return path.exists() and not is_ours(path.read_bytes())


def is_ours(data: bytes) -> bool:
    """Whether a card has the mark."""
    return MARK.encode() in data


@contextmanager
def written(path: Path, text: str) -> Iterator[None]:
    """The card lies ready within the block, and is put in its place where that ends well."""
    with replacing(path) as ready:
        ready.write_text(text, encoding="utf-8")
        yield


def _front(content: Content, base: str | None, is_peft: bool) -> list[str]:
    """The lines for the hub, in YAML; quoted as in JSON, which YAML contains."""
    library = "peft" if is_peft else "vblora"
    tags = list(dict.fromkeys(("vblora", content.config.method)))
    lines = ["---"]
    if base is not None:
        lines.append(f"base_model: {json.dumps(base)}")
        tags.append(f"base_model:adapter:{base}")
    task = CLASSES.get(content.task_type or "", (None, None))[1]
    lines += [f"library_name: {library}", *([f"pipeline_tag: {task}"] if task else []), "tags:"]
    return [*lines, *(f"- {json.dumps(tag)}" for tag in tags), "---"]


def _table(content: Content, base: str | None) -> list[str]:
    config, count = content.config, content.config.count(content.shapes)
    settings = {name: value for name, value in config.to_dict().items() if value not in (None, [], {})}
    shown = ", ".join(f"{name} {_short(value)}" for name, value in sorted(settings.items()))
    kinds = ", ".join(f"`{kind}`" for kind in dict.fromkeys(shape.kind for shape in content.shapes))
    form = "top-k form, to use" if form_of(content.tensors) == "topk" else "full form, to go on training from"
    rows = [
        ("method", METHODS.get(config.method, config.method)),
        ("settings", shown),
        ("adapted layers", f"{len(content.shapes):,}: {kinds}"),
        ("stored parameters", f"{count.parameters:,}, as the paper counts them"),
        ("numbers in the file", f"{_numbers(content.tensors):,} ({_bytes(content.tensors):,} bytes): {form}"),
    ]
    if content.heads:
        rows.append(("heads, trained in full", f"{_numbers(content.heads):,} ({_bytes(content.heads):,} bytes)"))
    title = f"# {METHODS.get(config.method, config.method).split(' (')[0]} adapter" + (f" of {base}" if base else "")
    return [title, "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _code(content: Content, is_peft: bool) -> list[str]:
    kind = CLASSES.get(content.task_type or "", ("AutoModel", None))[0]
    name = json.dumps(hub_name(content.base_model) or BASE)
    labels = content.num_labels is not None and content.task_type in ("SEQ_CLS", "TOKEN_CLS")
    more = f", num_labels={content.num_labels}" if labels else ""
    base = [f"from transformers import {kind}", "", f"model = {kind}.from_pretrained({name}{more})"]
    if content.task_type is None:
        base = ["", "model = ...  # the base model"]
    place = json.dumps(PLACE)
    lines = ["## Load it", "", "```python", "import vblora", *base, f"adapter = vblora.load(model, {place})", "```"]
    if is_peft:
        lines += ["", "With PEFT:", "", "```python", "import peft", *base]
        lines += [f"model = peft.PeftModel.from_pretrained(model, {place})", "```"]
    return lines


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return f"`{text}`" if isinstance(value, (str, list, dict)) else text


def _numbers(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
