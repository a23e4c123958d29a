"""Recordings and transcripts as batches for Whisper's decoder.

The decoder reads the prompt and the text, and is to say the text and the end; what follows the end has no label. The
padding's token is the end's too, so labels are left out by where a row ends, never by the token's number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from features import Encoded, Features
from speech_data import Clip
from vblora_experiments.causal import IGNORED
from whisper_models import Prompt


def text_tokens(
    clips: Sequence[Clip], tokenizer: Any, prompt: Prompt, longest: int, long: str = "refuse"
) -> dict[int, list[int]]:
    """The tokens of the transcripts by their clips' numbers, with a blank before as Whisper says them, and the end.

    Args:
        clips: with the transcripts.
        tokenizer: the model's.
        prompt: what stands before a text.
        longest: the positions that the decoder has.
        long: what is done about transcripts that are longer with their prompt: "refuse", or "leave_out", which says so.

    Raises:
        ValueError: a transcript is longer and is refused, or all are.
    """
    texts = tokenizer([f" {clip.text}" for clip in clips], add_special_tokens=False)["input_ids"]
    rows = {number: [*ids, tokenizer.eos_token_id] for number, ids in enumerate(texts)}
    sizes = {number: len(prompt.ids) + len(row) - 1 for number, row in rows.items()}
    too_long = [number for number, size in sizes.items() if size > longest]
    if too_long:
        first, count = clips[too_long[0]].where, len(too_long)
        if long == "refuse" or count == len(rows):
            raise ValueError(
                f"{first}: the transcript has {sizes[too_long[0]]} tokens, and the decoder reads {longest}: remove "
                "the row, or --long_clips leave_out"
            )
        print(f"{count} transcripts are longer than the {longest} tokens of the decoder and are left out ({first})")
    return {number: row for number, row in rows.items() if sizes[number] <= longest}


OWN_FRAMES = "own_frames"


class SpeechRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Recordings as features or as the encoder's outputs, each with its text; column "input_ids" is the texts'.

    Args:
        heard: of all recordings.
        texts: by the numbers of those that are used.
    """

    def __init__(self, heard: Features | Encoded, texts: Mapping[int, list[int]]) -> None:
        self.heard, self.numbers, self.texts = heard, list(texts), list(texts.values())

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            return {"input_ids": self.texts}[index]
        number = self.numbers[index]
        row = {"input_ids": self.texts[index], "heard": self.heard.of(number)}
        if isinstance(self.heard, Features):
            row[OWN_FRAMES] = self.heard.own_frames(number)
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
