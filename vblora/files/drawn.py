"""The selection that a seed draws: an adapter whose selection never moved need not store it.

With k = 1, or where the logits are not trained, every sub-vector keeps the vectors it was attached with. Whoever has
the seed draws them again (`vblora.logits.draw`). PyTorch draws normal numbers otherwise on other kinds of processors,
so a file has the SHA-256 of what was drawn, and a reader that draws something else refuses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from vblora.bank import Layout, select, topk_tensors
from vblora.config import VBLoRAConfig
from vblora.counts import sub_vectors
from vblora.logits import draw
from vblora.shapes import LayerShape

SELECTION = ("topk_indices", "topk_weights")
# Of anybody's file: the time to draw, and the memory of what is selected. Llama2-70B's linear layers with r 4, b 256,
# k 4 and a bank of 2,048 have 414 million logits and select 0.8 million vectors.
MOST_DRAWN, MOST_SELECTED = 2**29, 2**22


def selection_of(config: VBLoRAConfig, shapes: Sequence[LayerShape], seed: int | None) -> dict[str, Tensor]:
    """The tensors `SELECTION` of an adapter as `attach` makes it from this seed.

    Raises:
        ValueError: no seed is known, or more logits would have to be drawn, or vectors selected, than anybody's
            file may ask for.
    """
    if seed is None:
        raise ValueError("no seed is known for it, so that its selection cannot be drawn again")
    rows = sub_vectors(shapes, config.r, config.vector_length)
    if rows * config.num_vectors > MOST_DRAWN:
        raise ValueError(f"{rows * config.num_vectors:,} logits are more than the {MOST_DRAWN:,} drawn for a file")
    if rows * config.topk > MOST_SELECTED:
        raise ValueError(
            f"{rows * config.topk:,} selected vectors are more than the {MOST_SELECTED:,} drawn for a file"
        )
    layout = Layout(shapes, config.r, config.vector_length)
    bank, blocks = draw(config, layout.parts, seed)
    chosen = [select(block, config.topk) for block in blocks]
    values, indices = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    tensors = topk_tensors(bank, indices, values)
    return {name: tensors[name] for name in SELECTION}


def code_of(tensor: Tensor) -> list[str]:
    """What stands for a drawn tensor in a file's codes."""
    whole = not tensor.is_floating_point()
    numbers = tensor.detach().cpu().to(torch.int64 if whole else torch.float32).contiguous()
    return ["seed", hashlib.sha256(numbers.numpy().tobytes()).hexdigest()]


def is_code(code: object) -> bool:
    return isinstance(code, list) and len(code) == 2 and code[0] == "seed" and isinstance(code[1], str)
