from __future__ import annotations

import pytest

import hyperparameters

TASKS = ("sst2", "mrpc", "cola", "qnli", "rte", "stsb")

# Table 7 of the paper, column by column in the order of TASKS.
TABLE_7 = {
    "roberta_base": {
        "num_train_epochs": (60, 30, 80, 25, 160, 80),
        "learning_rate": (4e-3, 4e-3, 2e-2, 1e-2, 2e-2, 2e-2),
        "max_length": (512,) * 6,
    },
    "roberta_large": {
        "num_train_epochs": (20, 40, 40, 20, 40, 40),
        "learning_rate": (3e-3, 3e-3, 3e-3, 2e-3, 2e-3, 6e-3),
        "max_length": (128,) * 6,
    },
}
SAME_EVERYWHERE = {
    "rank": 4,
    "topk": 2,
    "num_vectors": 90,
    "vector_length": 256,
    "init_logits_std": 0.01,
    "init_vector_bank_bound": 0.02,
    "learning_rate_vector_bank": 0.001,
    "learning_rate_logits": 0.01,
    "weight_decay": 0.1,
    "warmup_steps": 0.06,
    "per_device_train_batch_size": 32,
    "lr_scheduler_type": "linear",
}


@pytest.mark.parametrize("targets", ["qv", "all"])
@pytest.mark.parametrize("model", TABLE_7)
def test_rows_are_table_7(model, targets):
    for column, task in enumerate(TASKS):
        varying = {name: values[column] for name, values in TABLE_7[model].items()}
        assert hyperparameters.row(model, task, targets) == {
            "model_name_or_path": model.replace("_", "-"),
            "task": task,
            "targets": targets,
            **varying,
            **SAME_EVERYWHERE,
        }


def test_targets_name_the_linear_layers_of_an_encoder():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.RobertaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
    )
    encoder = transformers.RobertaModel(config).encoder
    linear = {name for name, module in encoder.named_modules() if isinstance(module, torch.nn.Linear)}

    def hit(targets):
        suffixes = hyperparameters.TARGETS[targets]
        return {name for name in linear if any(name.endswith("." + suffix) for suffix in suffixes)}

    assert hit("all") == linear and len(linear) == 6
    assert {name.rsplit(".", 1)[1] for name in hit("qv")} == {"query", "value"}


def test_prints_flags_one_per_line(capsys):
    assert hyperparameters.main(["roberta_base", "cola", "qv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("--") and len(line.split()) == 2 for line in lines)
    printed = dict(line.split() for line in lines)
    expected = {f"--{name}": value for name, value in hyperparameters.row("roberta_base", "cola", "qv").items()}
    assert printed.keys() == expected.keys()
    for name, value in expected.items():
        assert printed[name] == value if isinstance(value, str) else float(printed[name]) == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bert", "cola", "qv"], ("'bert'", "roberta_base", "roberta_large")),
        (["roberta_base", "wnli", "qv"], ("'wnli'", "stsb")),
        (["roberta_base", "cola", "k"], ("'k'", "qv", "all")),
        ([], ("usage", "roberta_base", "cola", "qv")),
    ],
)
def test_unknown_names_exit_2_with_one_line(arguments, words, capsys):
    assert hyperparameters.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words)
