"""Causal language models: loading them in 16, 8 or 4 bits, and batches of encoded rows, padded or packed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vblora.training import commands

IGNORED = -100  # labels that the loss leaves out
FLAG = "--model_name_or_path DIR"
BITS = (16, 8, 4)


class Encoded(NamedTuple):
    """A row as token numbers, and its labels."""

    input_ids: list[int]
    labels: list[int]


def load_model(name: str, dtype: str = "auto", bits: int = 16, device_map: str | None = None) -> Any:
    """The causal model of this name or folder.

    Args:
        name: on the hub, or a folder.
        dtype: of the weights that are not quantised, and of the computation: "auto" is the one they are kept in.
        bits: 4 is NF4 with double quantisation (QLoRA), 8 is LLM.int8(), both by bitsandbytes; 16 is as `dtype` says.
        device_map: accelerate's: "auto" spreads the model over all GPUs and, beyond them, the main memory. Unless
            given, a quantised model goes to this process's own device.

    Raises:
        ValueError: the model cannot be had, or what quantisation needs is missing.
    """
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else torch_dtype(dtype)}
    if bits != 16:
        options["quantization_config"] = quantisation(bits, torch.bfloat16 if dtype == "auto" else torch_dtype(dtype))
        device_map = device_map or own_device()
    if device_map is not None:
        options["device_map"] = device_map if device_map in ("auto", "balanced", "sequential") else {"": device_map}
    from transformers import AutoModelForCausalLM

    return commands.from_hub(lambda: AutoModelForCausalLM.from_pretrained(name, **options), name, FLAG)


def quantisation(bits: int, compute: torch.dtype) -> Any:
    """bitsandbytes' configuration: NF4 with double quantisation, or 8 bits.

    Raises:
        ValueError: other bits, or bitsandbytes is missing.
    """
    from transformers import BitsAndBytesConfig

    if bits not in BITS[1:]:
        raise ValueError(f"--bits {bits}: 16, 8 and 4 are offered")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"--bits {bits} needs bitsandbytes: pip install 'vblora[quant]'")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def torch_dtype(name: str) -> torch.dtype:
    """The type of this name.

    Raises:
        ValueError: there is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"--dtype {name}: no such type; auto, float32, bfloat16 and float16 are some")
    return found


def own_device() -> str:
    """The device of this process."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer, with a token to pad with, which is never looked at."""
    from transformers import AutoTokenizer

    tokenizer = commands.from_hub(lambda: AutoTokenizer.from_pretrained(name), name, FLAG)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no end token, which every row needs")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class EncodedRows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Encoded rows as the trainer takes them; by a column's name all of that column."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self.rows = [one._asdict() for one in encoded]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> Any:
        return [row[index] for row in self.rows] if isinstance(index, str) else self.rows[index]


class Padded:
    """Batches padded on the right to their longest row."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": _filled(rows, "input_ids", self.pad, width),
            "attention_mask": torch.tensor(mask),
            "labels": _filled(rows, "labels", IGNORED, width),
        }


# ------------------------------------------------------------------------------------- packing


class PackedRows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Several rows in one, up to `length` tokens (a longer row stands alone), with positions that begin anew.

    A model that is given these positions, no mask and no cache (use_cache false, as the trainer sets it) lets no token
    see another row: transformers' masks and flash attention both go by the positions. The first label of each row but
    the first is at its second token, so that no row is predicted from the one before.
    """

    def __init__(self, encoded: Sequence[Encoded], length: int) -> None:
        self.rows: list[dict[str, list[int]]] = []
        for members in _bins([len(one.input_ids) for one in encoded], length):
            parts = [encoded[number] for number in members]
            self.rows.append(
                {
                    "input_ids": [i for part in parts for i in part.input_ids],
                    "labels": [label for part in parts for label in [IGNORED, *part.labels[1:]]],
                    "position_ids": [at for part in parts for at in range(len(part.input_ids))],
                }
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> Any:
        return [row[index] for row in self.rows] if isinstance(index, str) else self.rows[index]


def _bins(lengths: Sequence[int], length: int) -> list[list[int]]:
    """The rows' numbers in bins of at most `length` tokens: longest rows first, each into the fullest bin with room."""
    by_room: dict[int, list[list[int]]] = {}  # bins by the room that is left in them
    full: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        room = min((r for r in by_room if r >= lengths[number]), default=None)
        if room is None:
            members, left = [number], length - lengths[number]
        else:
            members, left = by_room[room].pop(), room - lengths[number]
            members.append(number)
            if not by_room[room]:
                del by_room[room]
        if left > 0:
            by_room.setdefault(left, []).append(members)
        else:
            full.append(members)
    # In the order of their first row, so that the trainer's shuffling alone decides the order.
    return sorted([*full, *(members for bins in by_room.values() for members in bins)])


@torch.no_grad()
def check_packing(model: Any, token: int) -> None:
    """Refuse a model whose packed rows would see each other, by what two short rows give.

    Raises:
        ValueError: it goes by another mask than that of the positions (OPT and BLOOM do).
    """
    was_training, cached = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = False
    first, row = torch.arange(3), [token] * 4
    outputs = []
    for start in (first, first + 3):
        ids = torch.tensor([[*start.tolist(), *row]], device=model.device)
        positions = torch.tensor([[*range(len(start)), *range(len(row))]], device=model.device)
        outputs.append(model(input_ids=ids, position_ids=positions).logits[0, len(start) :].float())
    model.train(was_training)
    model.config.use_cache = cached
    if not torch.allclose(outputs[0], outputs[1], rtol=1e-2, atol=1e-2):
        raise ValueError(f"{type(model).__name__}: packed rows would see each other: leave --pack_length out")


class PaddedPacks:
    """Batches of packed rows; what pads one is a row of its own, which nothing else sees and the loss leaves out."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        positions = [row["position_ids"] + list(range(width - len(row["position_ids"]))) for row in rows]
        return {
            "input_ids": _filled(rows, "input_ids", self.pad, width),
            "labels": _filled(rows, "labels", IGNORED, width),
            "position_ids": torch.tensor(positions),
        }


def _filled(rows: list[dict[str, list[int]]], name: str, value: int, width: int) -> torch.Tensor:
    return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
