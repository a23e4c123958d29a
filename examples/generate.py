"""Teach a language model a text with VB-LoRA, merge, generate: python examples/generate.py

The model is a tiny Llama from a configuration; it learns to count on, which its random weights cannot.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vblora

STEPS = 200


def main() -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    no_ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=64, **size, **no_ends))
    chosen = vblora.recipe(model, "all-linear", modules_to_save=["lm_head"])
    adapter = vblora.attach(model, chosen.config, seed=0)
    optimizer = vblora.AdamW(chosen.param_groups(model, lr=1e-2))
    schedule = chosen.schedule(optimizer, STEPS)
    for step in range(STEPS):
        starts = torch.randint(0, 32, (16, 1), generator=torch.Generator().manual_seed(step))
        ids = (starts + torch.arange(16)) % 32  # each row counts up from its start
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), chosen.max_grad_norm)
        optimizer.step()
        schedule.step()
    model.eval()
    adapter.merge()
    prompt = torch.tensor([[5, 6, 7]])
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
    print(f"loss {loss.item():.3f}")
    print("5 6 7 goes on:", *text[0, 3:].tolist())


if __name__ == "__main__":
    main()
