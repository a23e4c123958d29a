"""Whisper models: loading them, a shorter window, which layers are adapted, and the tokens before a text."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, WhisperForConditionalGeneration, WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from features import FRAMES, POSITIONS
from vblora.hub import from_hub
from vblora.io import folder_fingerprint
from vblora.models import FLAG, torch_dtype
from vblora_experiments.whisper_counts import TARGETS

WINDOW = 30  # seconds that Whisper was trained to hear


def whisper_config(name: str, window: int) -> Any:
    """The configuration of a Whisper that hears `window` seconds at once; no weights are loaded.

    Raises:
        ValueError: it cannot be had, is no Whisper, or its window cannot be that long.
    """
    config = from_hub(lambda: AutoConfig.from_pretrained(name), name, FLAG)
    if config.model_type != "whisper":
        raise ValueError(f"{name} is a model of type {config.model_type}, not a Whisper")
    check_window(window, config.max_source_positions // POSITIONS)
    return config


def check_window(window: int, longest: int) -> None:
    if not 1 <= window <= longest:
        raise ValueError(f"--window must be from 1 to {longest} seconds for this model, not {window}")


def load_whisper(name: str, dtype: str = "float32", window: int = WINDOW) -> Any:
    """The Whisper of this name or folder.

    Args:
        name: on the hub, or a folder.
        dtype: of the weights; they are kept in half precision mostly, and trained in float32.
        window: seconds it hears at once, of the 30 it was trained on.

    Raises:
        ValueError: it cannot be had, is no Whisper, or its window cannot be that long.
    """
    whisper_config(name, window)
    kind = torch_dtype(dtype)
    model = from_hub(lambda: WhisperForConditionalGeneration.from_pretrained(name, dtype=kind), name, FLAG)
    shorten(model, window)
    return model


def shorten(model: Any, window: int) -> None:
    """Let a model hear `window` seconds at once: the encoder's first positions, and less to compute.

    Raises:
        ValueError: less than a second, or more than the model has positions for.
    """
    encoder = model.get_encoder()
    check_window(window, encoder.embed_positions.num_embeddings // POSITIONS)
    positions = encoder.embed_positions.weight[: window * POSITIONS].detach().clone()
    encoder.embed_positions = nn.Embedding.from_pretrained(positions, freeze=True)
    encoder.max_source_positions = model.config.max_source_positions = window * POSITIONS


def load_tokenizer(name: str) -> Any:
    """The Whisper tokenizer of this name or folder."""
    return from_hub(lambda: WhisperTokenizer.from_pretrained(name), name, FLAG)


def model_print(name: str, config: Any) -> str:
    """What tells a model's weights from others: a folder's fingerprint, or the name on the hub and its revision."""
    revision = getattr(config, "_commit_hash", None)
    return folder_fingerprint(Path(name)) if Path(name).is_dir() else f"{name}@{revision}" if revision else name


def target_modules(targets: str) -> str:
    """The regular expression of the layers to adapt: of a name in `TARGETS`, or as given.

    Raises:
        ValueError: it is none.
    """
    expression = TARGETS.get(targets, targets)
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"--targets {targets}: {error}; one of {', '.join(TARGETS)}, or a regular expression"
        ) from error
    return expression


def check_targets(model: Any, targets: str) -> None:
    """Refuse an expression that matches a convolution, whose stride Whisper itself asks for.

    Raises:
        ValueError: naming the first.
    """
    expression = target_modules(targets)
    for name, module in model.named_modules():
        if re.fullmatch(expression, name) and isinstance(module, nn.Conv1d):
            raise ValueError(
                f"--targets {targets} matches {name}, a convolution, which is not adapted; one of "
                f"{', '.join(TARGETS)}, or an expression for linear layers alone"
            )


def trains_encoder(model: Any) -> bool:
    """Whether the encoder's outputs depend on anything that is trained, whichever method put it there.

    Some methods keep their parameters outside the layers that use them, so the encoder is asked, with silence.
    """
    encoder, frames = model.get_encoder(), model.config.max_source_positions * FRAMES // POSITIONS
    silence = torch.zeros(1, model.config.num_mel_bins, frames, dtype=encoder.dtype, device=encoder.device)
    training = encoder.training
    encoder.eval()  # no dropout, which would draw
    nothing = torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda kept: kept)  # no backward pass follows
    with torch.enable_grad(), nothing:
        output = encoder(silence).last_hidden_state
    encoder.train(training)
    return bool(output.requires_grad)


@dataclass(frozen=True)
class Prompt:
    """The tokens that stand before every text, and why.

    Attributes:
        ids: of an English-only model the start and "no timestamps"; else language and task between them.
        language: of the texts, as it was given.
        token: the language's token; "" where the model has none.
    """

    ids: tuple[int, ...]
    language: str
    token: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ids": list(self.ids)}


def prompt_of(model: Any, tokenizer: Any, language: str, language_token: str | None = None) -> Prompt:
    """The prompt for transcribing a language.

    Args:
        model: the Whisper.
        tokenizer: its own.
        language: a code such as "it" or a name such as "italian"; for an English-only model any word.
        language_token: the code whose token is used instead, for a language without one.

    Raises:
        ValueError: an unknown language, a language token for an English-only model, or a model without the tokens.
    """
    start, end = _id(tokenizer, "<|startoftranscript|>"), _id(tokenizer, "<|notimestamps|>")
    if not is_multilingual(model):
        if language_token is not None:
            raise ValueError(
                f"--language_token {language_token}: this model is English-only and has no language to name"
            )
        return Prompt((start, end), language, "")
    chosen = (language_token or language).lower()
    code = {name: code for code, name in LANGUAGES.items()}.get(chosen, chosen)
    if code not in LANGUAGES:
        flag = "--language_token" if language_token else "--language"
        raise ValueError(
            f"{flag} {language_token or language}: Whisper has no token of this language; name the one that is "
            f"nearest with --language_token, of {', '.join(LANGUAGES)}"
        )
    token = f"<|{code}|>"
    ids = (start, _id(tokenizer, token), _id(tokenizer, "<|transcribe|>"), end)
    return Prompt(ids, language, token)


def is_multilingual(model: Any) -> bool:
    """Whether a model takes a language and a task, as its generation settings say or else its vocabulary."""
    said = getattr(model.generation_config, "is_multilingual", None)
    return bool(said) if said is not None else model.config.vocab_size != 51864


def _id(tokenizer: Any, token: str) -> int:
    known = tokenizer.get_vocab()
    if token not in known:
        raise ValueError(
            f"the model's tokenizer has no {token}: it cannot be asked for a transcript; take a Whisper with it"
        )
    return int(known[token])
