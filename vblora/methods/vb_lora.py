"""VB-LoRA: factors composed from one vector bank (arXiv 2405.15179, Section 3)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vblora import counting
from vblora.adapter import Adapter, TensorSpec
from vblora.bank import Factors, Layout, compose
from vblora.config import AdapterConfig
from vblora.counting import LayerShape
from vblora.logits import LogitTable, draw
from vblora.optim import register_owner


@dataclass(kw_only=True)
class VBLoRAConfig(AdapterConfig):
    """Settings of VB-LoRA, under PEFT's field names (see also `AdapterConfig`).

    Args:
        num_vectors: h, the number of vectors in the bank.
        vector_length: b, the length of a sub-vector. It need not divide the layers' widths.
        topk: k, the vectors mixed into a sub-vector.
        vblora_dropout: dropout probability on the factors' input.
        init_vector_bank_bound: the bank starts uniform in [-bound, bound].
        init_logits_std: the logits start normal with this standard deviation. PEFT's default is 0.1; the
            authors' GLUE code, and this project's GLUE scripts, use 0.01.
    """

    method: ClassVar[str] = "vblora"

    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_vectors", "vector_length", "topk")
        self.require_probability("vblora_dropout")
        if self.topk > self.num_vectors:
            raise ValueError(f"topk {self.topk} is more than the {self.num_vectors} vectors of the bank")
        for name in ("init_vector_bank_bound", "init_logits_std"):
            self.require_number(name)

    @property
    def dropout(self) -> float:
        return self.vblora_dropout


class VBLoRA(Adapter, config=VBLoRAConfig):
    """The bank and the selection of one adapter.

    Trained by gradient: `vector_bank` (h, b) and `topk_logits` (N, k), the selected logits. The rest of the N x h
    logits, in `logits`, has no gradient: `vblora.AdamW` moves it and selects again after each step. It is kept as a
    table of those that matter (`vblora.logits`); `dense_logits` gives all. `logits` is None for an adapter loaded from
    a top-k file, which can be used and merged, and trained only after `redraw_logits`.
    """

    groups: ClassVar[dict[str, str]] = {"vector_bank": "vector_bank", "topk_logits": "logits"}

    config: VBLoRAConfig
    vector_bank: nn.Parameter
    topk_logits: nn.Parameter
    topk_indices: Tensor
    logits: LogitTable | None

    def __init__(self, config: VBLoRAConfig, targets: Mapping[str, nn.Module], seed: int | None) -> None:
        super().__init__(config, targets, seed)
        self.layout = Layout(self.shapes, config.r, config.vector_length)
        n, h, b, k = self.layout.rows, config.num_vectors, config.vector_length, config.topk
        self.vector_bank = nn.Parameter(torch.zeros(h, b))
        self.topk_logits = nn.Parameter(torch.zeros(n, k))
        self.register_buffer("topk_indices", torch.zeros(n, k, dtype=torch.long))
        self.register_module("logits", None)
        self._selection_kept = False  # vblora.AdamW has stepped the logits
        self._warned = False
        if seed is not None:
            self._draw(seed)
        self._note_owner()

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        self.vector_bank.copy_(draw(self.config, self.layout.rows, seed)[0])
        self.logits = LogitTable(self.config, self.layout.rows)
        self.logits.start(seed)
        self._select()

    def compose(self) -> tuple[Tensor, ...]:
        if not torch.compiler.is_compiling():
            self._warn_if_not_reselected()
        return (compose(self.vector_bank, self.topk_indices, self.topk_logits),)

    def factors(self, composed: tuple[Tensor, ...]) -> list[Factors]:
        return self.layout.factors(composed[0])

    def stored_parameters(self) -> counting.Count:
        c = self.config
        return counting.count_vblora(
            self.shapes, r=c.r, num_vectors=c.num_vectors, vector_length=c.vector_length, topk=c.topk
        )

    @torch.no_grad()
    def selection(self) -> tuple[Tensor, Tensor]:
        """The selected vectors of each sub-vector and their weights, both (N, k), the heaviest first."""
        return self.topk_indices, self.topk_logits.softmax(dim=-1)

    def step_selection(self) -> Tensor:
        """The indices (N, k) that training has now."""
        return self.topk_indices

    @torch.no_grad()
    def dense_logits(self) -> Tensor:
        """All h logits of each sub-vector, up to date: a new (N, h) tensor."""
        return self._require_logits().dense().scatter_(1, self.topk_indices, self.topk_logits.detach())

    @torch.no_grad()
    def select(self, logits: Tensor) -> None:
        """Take over these (N, h) logits and select the k largest of each row anew."""
        table = self._require_logits()
        table.take_over(logits.to(self.vector_bank), logits.topk(self.config.topk, dim=-1).indices, self.init_seed)
        self._select()

    @torch.no_grad()
    def reselect(self) -> None:
        """Select anew after something other than `vblora.AdamW` changed `topk_logits`."""
        table = self._require_logits()
        table.make_room()
        table.put(self.topk_logits)
        self._select()

    def _select(self) -> None:
        values, indices = self._require_logits().select()
        self.topk_logits.copy_(values)
        self.topk_indices.copy_(indices)

    @torch.no_grad()
    def redraw_logits(self, seed: int) -> None:
        """Make an adapter from a top-k file trainable: draw the logits it lacks, as `attach` draws them from `seed`.

        The selected ones are log w + c. Softmax leaves c free, row by row: it is chosen so that the smallest
        selected logit is as far above the k-th largest drawn one, which it was when training began, as training has
        probably raised it (`_raised`). So the others keep the values they started with, which they have moved from
        only if they were ever selected, and the selection is about as settled as it was. The few (at most k) that
        would not be below the selected ones, because they were selected once and are no longer, are mirrored to as
        far below the smallest. A weight under 2^-24, the last bit of a sum of 1 in float32, counts as that: its
        logarithm must be finite to be trained.
        """
        c = self.config
        drawn = torch.cat(list(draw(c, self.layout.rows, seed)[1]))  # (N, h), float32 on the CPU as when training began
        indices = self.topk_indices.cpu()
        logs = self.topk_logits.float().cpu().softmax(dim=-1).clamp(min=2**-24).log()  # (N, k)
        largest = drawn.topk(c.topk, dim=-1).values  # (N, k)
        smallest = largest[:, -1:] + _raised(logs, largest)  # (N, 1)
        selected = logs - logs.min(dim=-1, keepdim=True).values + smallest
        below = torch.nextafter(2 * smallest - drawn, torch.tensor(-torch.inf))
        drawn = torch.where(drawn < smallest, drawn, below).scatter(1, indices, selected)
        # Not through `select`: where rounding to the adapter's precision makes logits equal, the selection stays.
        self.logits = LogitTable(c, self.layout.rows).to(self.vector_bank)
        self.logits.take_over(drawn.to(self.vector_bank.dtype), self.topk_indices, seed)
        self.topk_logits.copy_(selected)

    def _require_logits(self) -> LogitTable:
        if self.logits is None:
            raise ValueError(
                "this adapter came from a top-k file, which holds the selected logits only: to train on, load "
                'the full form (adapter.save(directory, form="full")), or have the others drawn again '
                "(vblora.load(model, directory, trainable=True))"
            )
        return self.logits

    def _note_owner(self) -> None:
        register_owner(self.topk_logits, self)

    @torch.no_grad()
    def _warn_if_not_reselected(self) -> None:
        """Training with an optimiser that knows nothing of the selection would silently freeze it.

        Told by the values, as fused optimisers change parameters without PyTorch's version counter noticing.
        """
        trained = self._composition is not None and self._composition.used
        if not trained or self._selection_kept or self._warned or self.logits is None:
            return
        if not torch.equal(self.logits.values.gather(1, self.logits.slots), self.topk_logits):
            self._warned = True
            warnings.warn(
                "the logits were stepped by another optimiser than vblora.AdamW, so the selection stays as it "
                "was; train with vblora.AdamW(vblora.param_groups(model, ...)), or call adapter.reselect()",
                stacklevel=2,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._note_owner()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._note_owner()  # with assign=True the parameters are new objects

    @classmethod
    def spec(cls, config: AdapterConfig, shapes: Sequence[LayerShape], form: str) -> dict[str, TensorSpec]:
        assert isinstance(config, VBLoRAConfig)
        n = counting.sub_vectors(shapes, config.r, config.vector_length)
        h, b, k = config.num_vectors, config.vector_length, config.topk
        bank = {"vector_bank": TensorSpec((h, b))}
        if form == "full":
            return {**bank, "logits": TensorSpec((n, h))}
        return {**bank, "topk_indices": TensorSpec((n, k), below=h), "topk_weights": TensorSpec((n, k - 1))}

    @torch.no_grad()
    def tensors(self, form: str) -> dict[str, Tensor]:
        bank = self.vector_bank.detach()
        if form == "full":
            return {"vector_bank": bank, "logits": self.dense_logits()}
        return topk_tensors(bank, self.topk_indices, self.topk_logits)

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.vector_bank.copy_(tensors["vector_bank"])
        if "logits" in tensors:
            self.logits = LogitTable(self.config, self.layout.rows).to(self.vector_bank)
            self.select(tensors["logits"].to(self.vector_bank))
            return
        self.topk_logits.copy_(selected_logits(tensors["topk_weights"]))
        self.topk_indices.copy_(tensors["topk_indices"])
        self.logits = None


def _raised(selected: Tensor, drawn: Tensor) -> Tensor:
    """How far training has raised the smallest of the k selected logits, by how far it has moved them apart.

    Both are (N, k); the first is known up to a constant for each row. In adapters of MiniLM trained on CoLA, MRPC and
    SST-2 (k 2) it was 0.42, 0.32 and 0.35 of that, so a third is taken; that it is shared by the k - 1 gaps where k is
    larger is a guess. One number for all rows.
    """
    apart = [values.amax(dim=-1) - values.amin(dim=-1) for values in (selected, drawn)]
    gaps = 3 * max(1, selected.shape[-1] - 1)
    return (apart[0] - apart[1]).median().clamp(min=0) / gaps


def topk_tensors(bank: Tensor, indices: Tensor, selected: Tensor) -> dict[str, Tensor]:
    """The tensors of a top-k file, from the bank (h, b) and the selected logits (N, k) with their indices."""
    # In float32 whatever the adapter's precision: PEFT reads the weights in no other.
    weights = at_most_one(selected.float().softmax(dim=-1)[:, :-1])  # (N, k - 1)
    return {"vector_bank": bank, "topk_indices": indices, "topk_weights": weights}


def at_most_one(weights: Tensor) -> Tensor:
    """The first k - 1 of k weights in float32 (N, k - 1), lowered by some bits where rounding took their sum above 1.

    The reader takes the last weight as 1 - sum, and PEFT its logarithm: rounding must not make it negative.
    """
    above = weights.sum(dim=-1, keepdim=True) > 1
    return torch.where(above, weights * (1 - 4 * torch.finfo(torch.float32).eps), weights)


def selected_logits(weights: Tensor) -> Tensor:
    """The k logits (N, k), logarithms of the weights, that the first k - 1 weights of a top-k file stand for."""
    first = weights.float().clamp(min=0)  # (N, k - 1)
    last = (1 - first.sum(dim=-1, keepdim=True)).clamp(min=0)
    return torch.cat([first, last], dim=1).log()
