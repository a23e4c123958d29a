"""Words of tones as recordings, and tiny Whispers of random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

ENGLISH_ONLY = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"]
MULTILINGUAL = [*ENGLISH_ONLY, "<|en|>", "<|it|>", "<|transcribe|>", "<|translate|>"]
PITCH = {"do": 300, "re": 700, "mi": 1400, "fa": 2600}  # Hz
TEXTS = {
    "train": ["do re", "re do", "mi fa", "fa mi", "do mi", "mi do", "re fa", "fa re"],
    "dev": ["do fa", "fa do"],
    "test": ["re mi", "mi re", "do re mi"],
}


def sound(text: str, rate: int = 8000) -> np.ndarray:
    """A tone of a fifth of a second for each word."""
    times = np.arange(rate // 5) / rate
    return np.concatenate([np.sin(2 * np.pi * PITCH[word] * times) for word in text.split()]).astype(np.float32) / 2


def write_table(folder: Path, split: str, texts: list[str], rate: int = 8000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, text in enumerate(texts):
        soundfile.write(folder / f"{split}_{number}.wav", sound(text, rate), rate)
        rows.append(f"{split}_{number}.wav\t{text}\n")
    (folder / f"{split}.tsv").write_text("path\ttext\n" + "".join(rows))


def tokenizer_file(folder: Path, special: list[str]) -> Path:
    """Byte-level BPE of the words, with Whisper's special tokens at the end, as Whisper has them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([f" {text}" for texts in TEXTS.values() for text in texts], trainer)
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def save_whisper(folder: Path, special: list[str], **sizes) -> Path:
    """A Whisper of random weights that hears two seconds at most, with its tokenizer."""
    from transformers import WhisperTokenizer

    tokenizer = WhisperTokenizer(tokenizer_file=str(tokenizer_file(folder, special)), pad_token="<|endoftext|>")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    end = {f"{name}_token_id": ids["<|endoftext|>"] for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    chosen = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 100, **sizes}
    for side in ("encoder", "decoder"):
        chosen |= {f"{side}_layers": 2, f"{side}_attention_heads": 2}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        max_target_positions=32,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        **end,
        **chosen,
    )
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():  # further from uniform, so that rounding decides nothing
        for parameter in model.parameters():
            parameter.mul_(3)
    multilingual = "<|transcribe|>" in special or "<|it|>" in special
    model.generation_config = GenerationConfig(**end, is_multilingual=multilingual)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(config.num_mel_bins).save_pretrained(folder)
    return folder
