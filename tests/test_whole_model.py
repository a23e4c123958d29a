"""What is written of a whole model with an adapter; modules that are tied; models that have other adapters already."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers
from core_helpers import adapt, build, make_batch, run

import vblora


def logits(model, kind):
    model.eval()
    with torch.no_grad():
        return run(model, make_batch(kind))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "split_modules": {"c_attn": ["q", "k", "v"]}}),
        ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
    ],
)
def test_save_pretrained_writes_the_model_as_it_was_trained(kind, settings, tmp_path):
    model = build(kind)
    adapter = adapt(model, kind=kind, **settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, kind), logits(model, kind), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert again.state_dict().keys() == build(kind).state_dict().keys()
    adapter.detach()
    assert "save_pretrained" not in vars(model)


def test_save_pretrained_of_a_copy_writes_the_copy(tmp_path):
    model = build("llama")
    adapt(model, kind="llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.vblora_adapter.vector_bank.mul_(2)
    other.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, "llama"), logits(other, "llama"), rtol=1e-5, atol=1e-5)


def test_a_trainers_checkpoint_is_to_resume_from_and_says_so(tmp_path):
    model = build("llama")
    adapt(model, kind="llama")
    with pytest.warns(UserWarning, match=r"from_pretrained takes the base model alone\. adapter\.save"):
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path, state_dict=model.state_dict())  # said once


def test_the_state_of_a_merged_model_holds_no_adapter():
    model = build("llama")
    names = model.state_dict().keys()
    adapter = adapt(model, kind="llama")
    assert model.state_dict().keys() > names
    adapter.merge()
    assert model.state_dict().keys() == names
    adapter.unmerge()
    assert model.state_dict().keys() > names


def test_parameters_without_their_selection_are_refused():
    model = build("llama")
    adapt(model, kind="llama")
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    other = build("llama")
    adapt(other, kind="llama")
    with pytest.raises(RuntimeError, match=r"without the selection that they belong to: keep the adapter with"):
        other.load_state_dict(trained, strict=False)
    other.load_state_dict(model.state_dict())


def test_heads_that_are_tied_are_named_both_and_counted_once(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    base = transformers.LlamaForCausalLM(config)
    model = copy.deepcopy(base)
    adapter = adapt(model, kind="llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.add_(0.1 * torch.randn_like(model.lm_head.weight))
    assert adapter.head_parameters() == model.lm_head.weight.numel()
    assert adapter.config.modules_to_save == ["lm_head", "model.embed_tokens"]
    adapter.save(tmp_path / "ours")
    adapter.export_lora(tmp_path / "lora")
    ids = torch.arange(10).view(2, 5)
    expected = model.eval()(ids).logits
    for directory in ("ours", "lora"):
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / directory)).eval()
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(base).eval()
    vblora.load(again, tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-6, atol=1e-6)


def test_on_top_of_peft_only_the_models_own_layers_are_adapted():
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapter = adapt(model, kind="llama", target_modules="all-linear")
    names = list(adapter.targets)
    assert not any("lora_" in name for name in names)
    assert any(name.endswith("q_proj.base_layer") for name in names) and any(n.endswith("v_proj") for n in names)
    adapter.detach()
    with pytest.raises(ValueError, match=r"q_proj has an adapter of PEFT's: call merge_and_unload\(\) first, or name"):
        adapt(model, kind="llama", target_modules=["q_proj"])


def mixtral():
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_experts_that_are_left_out_are_said_with_their_share(targets):
    model = mixtral()
    experts = sum(
        p.numel() for p in model.parameters() if p.ndim == 3 and (targets == "all-linear" or p.shape[2] == 16)
    )
    share = experts / sum(p.numel() for p in model.parameters())
    with pytest.warns(
        UserWarning, match=rf"parameters of experts stay as they are, {share:.0%} of the model's numbers"
    ):
        adapt(model, kind="llama", target_modules=targets)


def test_attention_alone_says_nothing_of_experts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(mixtral(), kind="llama", target_modules=["q_proj"])


def test_another_adapter_is_no_experts():
    model = build("llama")
    adapt(model, method="lora_xs", kind="llama", target_modules=["q_proj"])  # with one parameter of three dimensions
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(model, kind="llama", target_modules="all-linear")


def test_a_sentence_transformer_encodes_the_same_after_saving(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models as parts

    tokenizer = transformers.BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5})
    base = transformers.BertModel(transformers.BertConfig(**BERT))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = sentence_transformers.SentenceTransformer(
        modules=[parts.Transformer(str(tmp_path / "base")), parts.Pooling(8)], device="cpu"
    )
    with pytest.raises(ValueError, match=r"give the transformer in it, model\[0\]\.auto_model"):
        adapt(model, kind="bert", target_modules=["query"])
    plain = model.encode(["a a"])
    adapt(model[0].auto_model, kind="bert", target_modules=["query", "value"])
    expected = model.encode(["a a"])
    model.save(str(tmp_path / "out"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["a a"])
    assert abs(again - expected).max() < 1e-5 < abs(plain - expected).max()


BERT = {
    "vocab_size": 6,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}
