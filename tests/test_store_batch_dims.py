"""Which dimension has the rows of a batch: models with the sequence first, inside or from outside, beams, and heads."""

from __future__ import annotations

import pytest
import torch
from language_helpers import tiny_llama
from torch import nn
from transformers import LongformerConfig, LongformerModel, XLNetConfig, XLNetModel

import vblora


class Mixing(nn.Module):
    """Attention over positions without weights of its own, and a linear layer; the sequence first."""

    def __init__(self, width=16):
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):  # (positions, rows, width)
        weights = torch.einsum("sbf,tbf->bst", x, 0.2 * x).softmax(dim=-1)
        return x + self.down(torch.tanh(self.up(torch.einsum("bst,tbf->sbf", weights, x))))


class FirstInside(nn.Module):
    """Token ids as (rows, positions); the sequence first from the embeddings on, and flattened in one layer."""

    def __init__(self, flat=False):
        super().__init__()
        self.embed, self.layers = nn.Embedding(40, 16), nn.ModuleList([Mixing(), Mixing()])
        self.out, self.flat = nn.Linear(16, 8), flat

    def forward(self, input_ids):
        x = self.embed(input_ids).transpose(0, 1).contiguous()
        for layer in self.layers:
            x = layer(x)
        if self.flat:
            return self.out(x.reshape(-1, 16)).reshape(*x.shape[:2], 8).transpose(0, 1)
        return self.out(x).transpose(0, 1)


class FirstOutside(nn.Sequential):
    """(positions, rows, width) in and out."""

    def __init__(self):
        super().__init__(Mixing(), Mixing())


def xlnet():
    return XLNetModel(XLNetConfig(vocab_size=40, d_model=32, n_layer=2, n_head=2, d_inner=64, dropout=0.0))


def longformer():
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return LongformerModel(LongformerConfig(vocab_size=40, attention_window=[8], max_position_embeddings=64, **size))


def stored(model, folder, targets, names="abc", **settings):
    """A store of an adapter for each name, and what each gives where it alone is attached."""
    model.eval()
    where = {"target_modules": targets, "r": 2, "num_vectors": 12, "vector_length": 8, "topk": 2}
    for seed, name in enumerate(names):
        adapter = vblora.attach(model, vblora.VBLoRAConfig(**where, init_vector_bank_bound=1.0), seed=seed)
        adapter.pack(folder / f"{name}.safetensors")
        adapter.detach()
    return vblora.AdapterStore(model, folder, **settings)


@torch.no_grad()
def alone(model, folder, name, *args, **kwargs):
    adapter = vblora.load(model, folder / f"{name}.safetensors")
    output = model(*args, **kwargs)
    adapter.detach()
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("positions", [1, 3, 6, 7])
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (FirstInside, ["up", "down", "out"]),
        (xlnet, ["layer_1", "layer_2"]),
        (longformer, ["query", "value", "output.dense"]),
    ],
    ids=["own", "xlnet", "longformer"],
)
def test_each_row_has_its_adapter_where_the_sequence_comes_first_inside(make, targets, positions, tmp_path):
    torch.manual_seed(0)
    model = make()
    store = stored(model, tmp_path, targets)
    ids = torch.randint(3, 40, (3, positions), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for _ in range(2):
            with store.rows(["c", None, "a"]):
                output = model(input_ids=ids)
            output = output if isinstance(output, torch.Tensor) else output[0]
        base = model(input_ids=ids)
        base = base if isinstance(base, torch.Tensor) else base[0]
    for row, name in ((0, "c"), (2, "a")):
        expected = alone(model, tmp_path, name, input_ids=ids)
        torch.testing.assert_close(output[row], expected[row], atol=1e-5, rtol=1e-4)
        assert (expected[row] - base[row]).abs().max() > 1e-2
    torch.testing.assert_close(output[1], base[1], atol=1e-5, rtol=1e-4)


def test_rows_that_are_flattened_position_by_position_are_refused(tmp_path):
    torch.manual_seed(0)
    model = FirstInside(flat=True)
    store = stored(model, tmp_path, ["up", "out"])
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(1))
    said = "out does not see the rows of the batch one by one"
    with pytest.raises(ValueError, match=said), store.rows(["a", "b", "c"]), torch.no_grad():
        model(input_ids=ids)


@pytest.mark.parametrize(("positions", "said"), [(6, "say which with AdapterStore"), (3, "one by one.*batch_dim=1")])
def test_a_model_that_takes_the_sequence_first_is_refused_until_it_is_said(positions, said, tmp_path):
    torch.manual_seed(0)
    model, names = FirstOutside(), ["a", "b", "c"]
    x = torch.randn(positions, 3, 16)
    store = stored(model, tmp_path, ["up", "down"])
    with pytest.raises(ValueError, match=said), store.rows(names), torch.no_grad():
        model(x)
    store.close()
    store = vblora.AdapterStore(model, tmp_path, batch_dim=1)
    with store.rows(names), torch.no_grad():
        output = model(x)
    for row, name in enumerate(names):
        torch.testing.assert_close(output[:, row], alone(model, tmp_path, name, x)[:, row], atol=1e-5, rtol=1e-4)


def test_pytorchs_own_encoder_with_the_sequence_first(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x, names = torch.randn(6, 2, 16), ["a", "b"]
    padded = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])  # (rows, positions)
    stored(model, tmp_path, ["linear1", "linear2"]).close()
    store = vblora.AdapterStore(model, tmp_path, batch_dim=1)
    with store.rows(names), torch.no_grad():
        output = model(x, src_key_padding_mask=padded)
    for row, name in enumerate(names):
        expected = alone(model, tmp_path, name, x, src_key_padding_mask=padded)
        torch.testing.assert_close(output[:4, row], expected[:4, row], atol=1e-5, rtol=1e-4)


def test_beams_of_a_row_share_its_head_too(tmp_path):
    model = tiny_llama(61).eval()
    where = {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
        "r": 2,
        "num_vectors": 12,
        "vector_length": 8,
    }
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(1))
    how = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before, expected = model.lm_head.weight.detach().clone(), {}
    for seed, name in enumerate("ab"):
        adapter = vblora.attach(model, vblora.VBLoRAConfig(**where, topk=2, init_vector_bank_bound=1.0), seed=seed)
        with torch.no_grad():
            model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
        adapter.pack(tmp_path / f"{name}.safetensors")
        expected[name] = model.generate(ids, **how)
        adapter.detach()
        with torch.no_grad():
            model.lm_head.weight.copy_(before)
    store = vblora.AdapterStore(model, tmp_path)
    with store.rows(["b", "a"]):
        found = model.generate(ids, **how)
    assert torch.equal(found[0], expected["b"][0]) and torch.equal(found[1], expected["a"][1])
    assert not torch.equal(expected["a"], expected["b"])
