"""A Whisper model of CTranslate2 (model.bin, config.json, tokenizer.json) as a folder of transformers.

    python ASR/ctranslate2_whisper.py FOLDER OUT

Nothing is lost: the weights are in half precision there, and here. Quantised files (int8) are refused.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from vblora.io import new_directory, read_json
from vblora_experiments import commands

VERSION, KIND = 6, "WhisperSpec"
TYPES = {0: "float32", 1: "int8", 2: "int16", 3: "int32", 4: "float16"}  # CTranslate2's numbers of types
PARTS = {"qkv": 3, "kv": 2, "q": 1}
MULTILINGUAL = 51865  # tokens of the smallest vocabulary with languages

Variables = dict[str, np.ndarray]


class Named(dict[str, Any]):
    """What a file holds by name; what it lacks is an error that names the file and the key."""

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.file} has no {key!r}: it is not of CTranslate2's Whisper, or not the whole file")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER", help="with model.bin, config.json and tokenizer.json")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    chosen = parser.parse_args(arguments)
    convert(chosen.source, chosen.out)


def convert(source: Path, out: Path) -> None:
    """Write the model, its tokenizer and its feature extractor.

    Raises:
        ValueError: `source` lacks a file or holds no such model or a quantised one, or `out` exists.
    """
    for name in ("model.bin", "config.json", "tokenizer.json"):
        if not (source / name).is_file():
            raise ValueError(f"{source} has no {name}: it is no folder of CTranslate2's Whisper")
    variables = read_variables(source / "model.bin")
    refuse_quantised(variables)
    ids = special_tokens(source / "tokenizer.json")
    model = WhisperForConditionalGeneration(model_config(variables, ids))
    missing, unexpected = model.load_state_dict(state_of(variables), strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:  # which is the embedding's
        raise ValueError(f"{source}: tensors missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    config = source / "config.json"
    model.generation_config = generation_config(model.config, Named(config, read_json(config)), ids)
    processor = WhisperProcessor(
        WhisperFeatureExtractor(model.config.num_mel_bins),
        WhisperTokenizer(tokenizer_file=str(ids.file), pad_token="<|endoftext|>"),
    )
    with new_directory(out) as folder:
        model.half().save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters")


# --- The file -----------------------------------------------------------------------------------------------------


def read_variables(path: Path) -> Named:
    """The arrays of a model.bin by name.

    Raises:
        ValueError: another model, another version, a type that is not known, or a file that is cut short.
    """
    try:
        return Named(path, _Reader(path).variables())
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error})") from error


def refuse_quantised(variables: Named) -> None:
    """Weights in whole numbers mean nothing without their scales, which are not read here.

    Raises:
        ValueError: naming the first of them.
    """
    for name, array in variables.items():
        if name.endswith("_scale") or (name.endswith("/weight") and not np.issubdtype(array.dtype, np.floating)):
            raise ValueError(
                f"{variables.file}: {name} ({array.dtype}) is of a quantised model: take the float16 or float32 one"
            )


class _Reader:
    """Reads a model.bin from its start: little-endian numbers, texts with their length and a final zero."""

    def __init__(self, path: Path) -> None:
        self.path, self.data, self.at = path, memoryview(path.read_bytes()), 0

    def variables(self) -> Variables:
        version, kind, _revision = self.number("I"), self.text(), self.number("I")
        if (version, kind) != (VERSION, KIND):
            raise ValueError(f"{self.path} holds a {kind!r} in version {version}, not a {KIND} in version {VERSION}")
        return dict(self.variable() for _ in range(self.number("I")))

    def variable(self) -> tuple[str, np.ndarray]:
        name = self.text()
        shape = [self.number("I") for _ in range(self.number("B"))]
        code, size = self.number("B"), self.number("I")
        if code not in TYPES:
            raise ValueError(f"{self.path}: {name} has type {code}; {', '.join(TYPES.values())} are known")
        content = self.data[self.at : self.at + size]
        self.at += size
        kind = np.dtype(TYPES[code])
        if len(content) != size or size != kind.itemsize * int(np.prod(shape)):
            raise ValueError(f"{self.path} is cut short or damaged: {name} has {len(content)} of {size} bytes")
        return name, np.frombuffer(content, kind).reshape(shape)

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize(form)
        return int(value)

    def text(self) -> str:
        size = self.number("H")
        self.at += size
        return bytes(self.data[self.at - size : self.at - 1]).decode()


# --- Names and settings -------------------------------------------------------------------------------------------


def special_tokens(file: Path) -> Named:
    """The numbers of the tokens that tokenizer.json adds to the vocabulary."""
    added = [Named(file, token) for token in Named(file, read_json(file))["added_tokens"]]
    return Named(file, {token["content"]: token["id"] for token in added})


def state_of(variables: Variables) -> dict[str, torch.Tensor]:
    """The arrays by transformers' names. CTranslate2 keeps q, k and v of an attention in one (k and v of the other)."""
    state = {"decoder.embed_tokens.weight": variables["decoder/embeddings/weight"]}
    for conv in ("conv1", "conv2"):
        state |= _layer(variables, f"encoder.{conv}", f"encoder/{conv}")
    for side in ("encoder", "decoder"):
        state[f"{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
        state |= _layer(variables, f"{side}.layer_norm", f"{side}/layer_norm")
        for number in range(layers(variables, side)):
            state |= _block(variables, f"{side}.layers.{number}", f"{side}/layer_{number}")
    return {f"model.{name}": torch.from_numpy(value.astype(np.float32)) for name, value in state.items()}


def _block(variables: Variables, to: str, of: str) -> Variables:
    """One layer of the encoder or of the decoder."""
    state = _attention(variables, f"{to}.self_attn", f"{of}/self_attention", ("qkv",))
    if f"{of}/attention/linear_0/weight" in variables:  # the decoder's, over the encoder's output
        state |= _attention(variables, f"{to}.encoder_attn", f"{of}/attention", ("q", "kv"))
    state |= _layer(variables, f"{to}.fc1", f"{of}/ffn/linear_0")
    state |= _layer(variables, f"{to}.fc2", f"{of}/ffn/linear_1")
    return state | _layer(variables, f"{to}.final_layer_norm", f"{of}/ffn/layer_norm")


def _attention(variables: Variables, to: str, of: str, fused: tuple[str, ...]) -> Variables:
    state = _layer(variables, f"{to}_layer_norm", f"{of}/layer_norm")
    for number, parts in enumerate(fused):
        weights = np.split(variables[f"{of}/linear_{number}/weight"], PARTS[parts])
        biases = np.split(variables[f"{of}/linear_{number}/bias"], PARTS[parts])
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{to}.{part}_proj.weight"] = weight
            if part != "k":
                state[f"{to}.{part}_proj.bias"] = bias
            elif np.any(bias):  # Whisper's keys have none; CTranslate2 keeps zeros
                raise ValueError(f"{of} has a bias of its keys, which Whisper has not")
    return state | _layer(variables, f"{to}.out_proj", f"{of}/linear_{len(fused)}")


def _layer(variables: Variables, to: str, of: str) -> Variables:
    weight, bias = ("gamma", "beta") if f"{of}/gamma" in variables else ("weight", "bias")
    return {f"{to}.weight": variables[f"{of}/{weight}"], f"{to}.bias": variables[f"{of}/{bias}"]}


def layers(variables: Variables, side: str) -> int:
    """The number of layers of the encoder or of the decoder."""
    return len(
        {n.split("/")[1] for n in variables if n.startswith(f"{side}/layer_") and n.split("/")[1] != "layer_norm"}
    )


def model_config(variables: Variables, ids: dict[str, int]) -> WhisperConfig:
    """The sizes, read off the arrays' shapes."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    end = ids["<|endoftext|>"]
    sides: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    for side in ("encoder", "decoder"):
        sides[f"{side}_layers"] = layers(variables, side)
        sides[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        sides[f"{side}_ffn_dim"] = variables[f"{side}/layer_0/ffn/linear_0/bias"].size
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        decoder_start_token_id=ids["<|startoftranscript|>"],
        **sides,
    )


def generation_config(config: WhisperConfig, source: dict[str, Any], ids: dict[str, int]) -> GenerationConfig:
    """What decoding needs to know, from CTranslate2's config.json and the tokens."""
    settings: dict[str, Any] = {
        **{f"{name}_token_id": ids["<|endoftext|>"] for name in ("bos", "eos", "pad")},
        "decoder_start_token_id": config.decoder_start_token_id,
        "suppress_tokens": source["suppress_ids"],
        "begin_suppress_tokens": source["suppress_ids_begin"],
        "alignment_heads": source["alignment_heads"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "max_length": config.max_target_positions,
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
        "is_multilingual": config.vocab_size >= MULTILINGUAL,
    }
    if settings["is_multilingual"]:
        languages = [f"<|{code}|>" for code in LANGUAGES if f"<|{code}|>" in ids]
        settings["lang_to_id"] = {token: ids[token] for token in languages}
        settings["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    return GenerationConfig(**settings)


if __name__ == "__main__":
    commands.run(main, "ctranslate2_whisper")
