"""GGUF adapters: what is in the file, that a real engine decodes with it as we do, and what is refused."""

from __future__ import annotations

import sys

import numpy
import pytest
import torch
from core_helpers import adapt, build
from transformers import LlamaConfig, LlamaForCausalLM

import vblora
from vblora import cli
from vblora.files import gguf_lora, packed

gguf = pytest.importorskip("gguf", reason="llama.cpp's package writes the files: pip install gguf")


@pytest.fixture
def tiny(tmp_path):
    """A Llama with four heads on two for keys and values, saved, and its adapter, as a packed file."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    settings = {"target_modules": "all-linear", "num_vectors": 20, "vector_length": 16}
    adapter = vblora.attach(model, vblora.VBLoRAConfig(r=3, init_vector_bank_bound=0.4, **settings), seed=0)
    adapter.pack(tmp_path / "a.safetensors")
    return model, adapter, tmp_path


def export(folder, *more):
    base, source, out = (str(folder / name) for name in ("base", "a.safetensors", "a.gguf"))
    return cli.main(["export", base, out, "--adapter", source, "--to", "gguf", *more])


def turned(weight, heads):
    """The rows as llama.cpp's converter turns those of a whole weight."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def test_the_file_holds_the_adapters_updates_under_llama_cpps_names(tiny):
    _, adapter, folder = tiny
    assert export(folder) == 0
    reader = gguf.GGUFReader(folder / "a.gguf")
    found = {key: field.contents() for key, field in reader.fields.items()}
    assert (found["general.architecture"], found["general.type"]) == ("llama", "adapter")
    assert (found["adapter.type"], found["adapter.lora.alpha"]) == ("lora", 3.0)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    assert len(tensors) == 2 * len(adapter.targets) == 28
    for layer, (a, b) in adapter.layer_factors().items():
        number, kind = layer.split(".")[2], layer.rpartition(".")[2]
        name = f"blk.{number}.{names[kind]}.weight"
        expected = (b @ a).numpy()
        if kind in ("q_proj", "k_proj"):
            expected = turned(expected, {"q_proj": 4, "k_proj": 2}[kind])
        update = tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"]
        numpy.testing.assert_allclose(update, expected, rtol=0, atol=1e-5)


def test_gpt2s_fused_layer_has_all_its_parts(tmp_path):
    model = build("gpt2")
    adapter = adapt(model, kind="gpt2", target_modules=["c_attn"], split_modules={"c_attn": ["q", "k", "v"]})
    gguf_lora.export(adapter.content(), tmp_path / "a.gguf", model.config.to_dict(), dtype=torch.float16)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert set(tensors) == {f"blk.{n}.attn_qkv.weight.lora_{letter}" for n in range(2) for letter in "ab"}
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F16 for tensor in tensors.values())


def test_what_llama_cpp_cannot_take_is_refused_and_nothing_written(tiny, tmp_path, capsys, monkeypatch):
    model, _, folder = tiny
    out, config = tmp_path / "no.gguf", model.config.to_dict()
    content = packed.read(folder / "a.safetensors")
    with pytest.raises(ValueError, match="a model of type 'bert' is not known here; known: llama"):
        gguf_lora.export(content, out, {**config, "model_type": "bert"})
    with pytest.raises(ValueError, match=r"llama\.cpp's gpt2 has no layer that model\.layers\.0"):
        gguf_lora.export(content, out, {**config, "model_type": "gpt2"})
    with pytest.raises(ValueError, match="float32 or float16 here, not bfloat16"):
        gguf_lora.export(content, out, config, dtype=torch.bfloat16)
    with_head = adapt(build("bert"), kind="bert", target_modules=["query"], modules_to_save=["classifier"])
    with pytest.raises(ValueError, match="holds no heads, and this one has classifier"):
        gguf_lora.export(with_head.content(), out, config)
    assert cli.main(["export", str(folder / "a.safetensors"), str(out), "--to", "gguf"]) == 2
    assert "a GGUF file needs its model's configuration: vblora export MODEL" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert export(folder) == 2
    assert "pip install gguf" in capsys.readouterr().err
    assert not out.exists() and not (folder / "a.gguf").exists()


# --- In the engine ------------------------------------------------------------------------------------------------


def write_base(model, path):
    """The base model in float32 as llama.cpp reads it, without a tokenizer: it is asked by numbers of tokens."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if "adapter" in name:
            continue
        data = tensor.numpy()
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if f".{kind}." in name:
                data = turned(data, heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), numpy.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def greedy(engine, tokens, count):
    engine.reset()
    found, given = [], list(tokens)
    for _ in range(count):
        engine.eval(given)
        found.append(int(numpy.argmax(engine.scores[engine.n_tokens - 1])))
        given = found[-1:]
    return found


def test_llama_cpp_decodes_with_it_as_we_do(tiny):
    llama_cpp = pytest.importorskip("llama_cpp", reason="the engine: pip install llama-cpp-python (it is built there)")
    model, adapter, folder = tiny
    assert export(folder) == 0
    write_base(model, folder / "base.gguf")
    prompt = [5, 17, 33, 2, 60]
    settings = {
        "n_ctx": 64,
        "logits_all": True,
        "verbose": False,
        "n_threads": 1,
        "type_k": 0,
        "type_v": 0,
    }  # its cache in float32
    plain = llama_cpp.Llama(str(folder / "base.gguf"), **settings)
    engine = llama_cpp.Llama(str(folder / "base.gguf"), lora_path=str(folder / "a.gguf"), **settings)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
        ours = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=95)[0, 5:]
        with adapter.disabled():
            base = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=95)[0, 5:]
    assert greedy(plain, prompt, 20)[: len(base)] == base.tolist() != ours.tolist()
    assert greedy(engine, prompt, 20)[: len(ours)] == ours.tolist()
    engine.reset()
    engine.eval(prompt)
    numpy.testing.assert_allclose(engine.scores[: len(prompt)], logits.numpy(), rtol=0, atol=1e-3)
