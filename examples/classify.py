"""Fine-tune a classifier with VB-LoRA, save it, load it again: python examples/classify.py

The model is a tiny BERT from a configuration, and the task one that it can learn in seconds: does a sequence hold more
of the first half of the vocabulary than of the second? With a model of your own nothing else changes.
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification

import vblora

STEPS = 400


def build() -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=2, **size))


def batch(rows: int, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (rows, 15), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ((ids < 20).sum(1) > 7).long()}


def accuracy(model: BertForSequenceClassification) -> float:
    test = batch(500, seed=-1)
    with torch.no_grad():
        return (model.eval()(**test).logits.argmax(1) == test["labels"]).float().mean().item()


def main() -> None:
    model = build()
    chosen = vblora.recipe(model, "all-linear", modules_to_save=["classifier"])
    adapter = vblora.attach(model, chosen.config, seed=0)
    optimizer = vblora.AdamW(chosen.param_groups(model, lr=5e-3))
    schedule = chosen.schedule(optimizer, STEPS)
    print(f"before: {accuracy(model):.3f} of 500 right")
    for step in range(STEPS):
        loss = model.train()(**batch(32, seed=step)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), chosen.max_grad_norm)
        optimizer.step()
        schedule.step()
    print(
        f"after: {accuracy(model):.3f} of 500 right, with {adapter.stored_parameters().parameters:,} stored parameters"
    )
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(folder)
        again = build()
        vblora.load(again, folder)
        print(f"loaded: {accuracy(again):.3f} of 500 right")


if __name__ == "__main__":
    main()
