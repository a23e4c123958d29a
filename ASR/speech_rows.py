"""Recordings and transcripts as batches for Whisper's decoder.

The decoder reads the prompt and the text, and is to say the text and the end; what follows the end has no label. The
padding's token is the end's too, so labels are left out by where a row ends, never by the token's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from features import Encoded, Features
from speech_data import Clip
from vblora_experiments.causal import IGNORED
from whisper_models import Prompt


def text_tokens(clips: Sequence[Clip], tokenizer: Any, prompt: Prompt, longest: int) -> list[list[int]]:
    """The tokens of each transcript, with a blank before as Whisper says them, and the end.

    Raises:
        ValueError: a transcript with more tokens than the decoder has positions.
    """
    texts = tokenizer([f" {clip.text}" for clip in clips], add_special_tokens=False)["input_ids"]
    rows = [[*ids, tokenizer.eos_token_id] for ids in texts]
    for clip, row in zip(clips, rows, strict=True):
        if (size := len(prompt.ids) + len(row) - 1) > longest:
            raise ValueError(
                f"{clip.where}: the transcript has {size} tokens, and the decoder reads {longest}: remove it"
            )
    return rows


OWN_FRAMES = "own_frames"


class SpeechRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Recordings as features or as the encoder's outputs, each with its text; column "input_ids" is the texts'."""

    def __init__(self, heard: Features | Encoded, texts: Sequence[list[int]]) -> None:
        assert len(heard) == len(texts)
        self.heard, self.texts = heard, texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            return {"input_ids": self.texts}[index]
        row = {"input_ids": self.texts[index], "heard": self.heard.of(index)}
        if isinstance(self.heard, Features):
            row[OWN_FRAMES] = self.heard.own_frames(index)
        return row


class SpeechBatches:
    """Rows as the model's arguments; with features, each one's own number of frames too."""

    def __init__(self, prompt: Prompt, pad: int, dtype: torch.dtype) -> None:
        self.prompt, self.pad, self.dtype = list(prompt.ids), pad, dtype

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        heard = torch.stack([row["heard"] for row in rows]).to(self.dtype)
        batch: dict[str, Any] = decoder_inputs([row["input_ids"] for row in rows], self.prompt, self.pad)
        if OWN_FRAMES not in rows[0]:
            return {**batch, "encoder_outputs": (heard,)}
        return {**batch, "input_features": heard, OWN_FRAMES: torch.tensor([row[OWN_FRAMES] for row in rows])}


def decoder_inputs(texts: Sequence[list[int]], prompt: Sequence[int], pad: int) -> dict[str, torch.Tensor]:
    """What the decoder reads and is to say, each of shape (batch, tokens).

    It reads the prompt and the text without its end; at the prompt's last token and from there on it is to say the
    text and the end.
    """
    width = len(prompt) + max(map(len, texts)) - 1
    read, said = [], []
    for text in texts:
        rest = width - (len(prompt) + len(text) - 1)
        read.append([*prompt, *text[:-1], *[pad] * rest])
        said.append([*[IGNORED] * (len(prompt) - 1), *text, *[IGNORED] * rest])
    return {"decoder_input_ids": torch.tensor(read), "labels": torch.tensor(said)}
