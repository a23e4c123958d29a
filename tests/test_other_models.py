"""Models of other kinds, from their configurations: an adapter of each trains, is saved and loaded, and merges."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import vblora

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return model, {"pixel_values": images, "labels": torch.tensor([0, 2])}, ["classifier"]


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)
    )
    return model, {"input_ids": torch.tensor([[5, 6, 7, 1]]), "labels": torch.tensor([[8, 9, 1]])}, None


def bart():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {
        "d_model": 16,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 32,
        "dropout": 0.0,
    }
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=40, **sizes, **widths))
    return model, {"input_ids": torch.tensor([[5, 6, 7, 2]]), "labels": torch.tensor([[8, 9, 2]])}, None


def whisper():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "dropout": 0.0}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **widths, **tokens, max_source_positions=10, max_target_positions=8)
    model = transformers.WhisperForConditionalGeneration(config)
    sound = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0))
    return model, {"input_features": sound, "labels": torch.tensor([[8, 9, 2]])}, None


def clip():
    side = {**SMALL, "projection_dim": 8}
    texts = {**side, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=texts, vision_config={**side, "image_size": 16, "patch_size": 8})
    config.projection_dim = 8
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words = torch.tensor([[5, 6, 2], [7, 8, 2]])
    return transformers.CLIPModel(config), {"input_ids": words, "pixel_values": images, "return_loss": True}, None


def diffusion():
    """A diffusion transformer on noisy images, with their noise for its aim."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8}
    torch.manual_seed(0)
    inner = diffusers.DiTTransformer2DModel(**sizes, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2)

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, images, noise):
            found = self.inner(images + noise, timestep=torch.tensor([3]), class_labels=torch.tensor([1])).sample
            return transformers.utils.ModelOutput(loss=(found[:, :4] - noise).square().mean(), sample=found)

    generator = torch.Generator().manual_seed(0)
    return Denoiser(), {n: torch.randn(1, 4, 8, 8, generator=generator) for n in ("images", "noise")}, None


KINDS = {"ViT": vit, "T5": t5, "BART": bart, "Whisper": whisper, "CLIP": clip, "DiT": diffusion}


def outputs(model, batch):
    with torch.no_grad():
        found = model.eval()(**batch)
    return next(found[name] for name in ("logits", "logits_per_image", "sample") if name in found)


@pytest.mark.filterwarnings("error:.*experts")  # none of these has any
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_is_saved_and_loaded_and_merges(kind, tmp_path):
    torch.manual_seed(0)
    model, batch, heads = KINDS[kind]()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"num_vectors": 30, "vector_length": 8, "init_logits_std": 0.01, "init_vector_bank_bound": 0.3}
    skip = {"T5": ["lm_head"], "BART": ["lm_head"], "Whisper": ["proj_out"]}.get(kind)
    config = vblora.VBLoRAConfig(
        r=2, target_modules="all-linear", modules_to_save=heads, exclude_modules=skip, **settings
    )
    adapter = vblora.attach(model, config, seed=0)
    optimizer = vblora.AdamW(vblora.param_groups(model.train(), lr=1e-2, lr_vector_bank=2e-2, lr_logits=1e-2))
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.03
    trained = outputs(model, batch)
    adapter.save(tmp_path)
    adapter.merge()
    torch.testing.assert_close(outputs(model, batch), trained, rtol=1e-4, atol=1e-5)
    other, _, _ = KINDS[kind]()
    other.load_state_dict(start)
    assert not torch.allclose(outputs(other, batch), trained, atol=1e-3)
    vblora.load(other, tmp_path)
    torch.testing.assert_close(outputs(other, batch), trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [(nn.Conv2d(4, 4, 1), "Conv2d"), (nn.Embedding(5, 4), "Embedding"), (nn.LayerNorm(4), "LayerNorm")],
)
def test_a_layer_that_is_no_linear_one_is_refused_by_its_kind(layer, kind):
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": layer})
    config = vblora.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, target_modules=["first", "second"])
    with pytest.raises(ValueError, match=f"second is a {kind}; an adapter needs nn.Linear"):
        vblora.attach(model, config)
