"""VB-LoRA: factors composed from one vector bank (arXiv 2405.15179, Section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vblora.adapter import Adapter
from vblora.bank import Factors, Layout, compose, selected_logits, topk_tensors
from vblora.config import VBLoRAConfig
from vblora.logits import LogitTable, draw
from vblora.low_rank import is_traced
from vblora.methods.selected import Copies, check_written, register_owner, widen_copies


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
        self.selection_kept = False  # vblora.AdamW has stepped the logits
        self.warned = False  # see `check_written`
        self.copies = Copies([self])
        if seed is not None:
            self._draw(seed)
        self._note_owner()

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        self.vector_bank.copy_(draw(self.config, self.layout.parts, seed)[0])
        self.logits = LogitTable(self.config, self.layout.parts)
        self.logits.start(seed)
        self._select()

    def compose(self) -> tuple[Tensor, ...]:
        if not is_traced():
            check_written(self, torch.is_grad_enabled())
        return (compose(self.vector_bank, self.topk_indices, self.topk_logits),)

    def factors(self, composed: tuple[Tensor, ...]) -> list[Factors]:
        return self.layout.factors(composed[0])

    @torch.no_grad()
    def selection(self) -> tuple[Tensor, Tensor]:
        """The selected vectors of each sub-vector and their weights, both (N, k), the heaviest first."""
        return self.topk_indices, self.topk_logits.softmax(dim=-1)

    def step_selection(self) -> Tensor:
        """The indices (N, k) that training has now."""
        return self.topk_indices

    def logit_table(self) -> LogitTable:
        """The logits that training keeps, which `vblora.AdamW` moves.

        Raises:
            ValueError: the adapter came from a top-k file, which has none.
        """
        if self.logits is None:
            raise ValueError(
                "this adapter came from a top-k file, which holds the selected logits only: to train on, load "
                'the full form (adapter.save(directory, form="full")), or have the others drawn again '
                "(vblora.load(model, directory, trainable=True))"
            )
        return self.logits

    @torch.no_grad()
    def dense_logits(self) -> Tensor:
        """All h logits of each sub-vector, up to date: a new (N, h) tensor."""
        table = self.logit_table()
        return table.dense().scatter_(1, self.topk_indices, table.precise(self.topk_logits.detach()))

    @torch.no_grad()
    def select(self, logits: Tensor) -> None:
        """Take over these (N, h) logits and select the k largest of each row anew."""
        table = self.logit_table()
        table.take_over(logits.to(table.values), logits.topk(self.config.topk, dim=-1).indices, self.init_seed)
        self._select()

    @torch.no_grad()
    def reselect(self) -> None:
        """Select anew after something other than `vblora.AdamW` changed `topk_logits`."""
        self.make_room()
        self.logit_table().put(self.topk_logits)
        self._select()

    def make_room(self) -> None:
        """Widen the table of logits, and those of deep copies, where another step might reach its end."""
        if self.logit_table().make_room():
            widen_copies(self)

    def take_selection(self) -> None:
        """Select the k largest logits of the table: what an optimiser calls after it has moved them."""
        self._select()
        self.selection_kept = self.copies.reselected = True

    def _select(self) -> None:
        values, indices = self.logit_table().select()
        self.topk_logits.copy_(values)
        self.topk_indices.copy_(indices)

    def make_trainable(self, seed: int) -> None:
        if self.logits is None:
            self.init_seed = seed
            self.redraw_logits(seed)

    @torch.no_grad()
    def redraw_logits(self, seed: int) -> None:
        """Make an adapter from a top-k file trainable: draw the logits it lacks, as `vblora.methods.redraw` says."""
        from vblora.methods.redraw import redrawn

        drawn = redrawn(self.config, self.layout.parts, seed, self.topk_indices, self.topk_logits)
        # Not through `select`: where rounding to the adapter's precision makes logits equal, the selection stays.
        self.logits = LogitTable(self.config, self.layout.parts).to(self.vector_bank)
        self.logits.take_over(drawn.to(self.vector_bank.dtype), self.topk_indices, seed)
        self.topk_logits.copy_(drawn.gather(1, self.topk_indices.cpu()))

    def _note_owner(self) -> None:
        register_owner(self.topk_logits, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.copies.add(self)
        self._note_owner()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        needed = ["topk_indices", *([] if self.logits is None else ["logits.indices", "logits.values"])]
        if f"{prefix}topk_logits" in state and any(f"{prefix}{name}" not in state for name in needed):
            args[-1].append(  # the list of errors
                f"the state has {prefix}topk_logits without the selection that they belong to: keep the adapter with "
                "adapter.save(DIRECTORY), or the whole of model.state_dict() and not its parameters alone"
            )
        super()._load_from_state_dict(state, prefix, *args)
        self._note_owner()  # with assign=True the parameters are new objects

    @torch.no_grad()
    def tensors(self, form: str) -> dict[str, Tensor]:
        check_written(self, in_training=False)
        bank = self.vector_bank.detach()
        if form == "full":
            from vblora.methods.redraw import above_others

            return {"vector_bank": bank, "logits": above_others(self.dense_logits(), self.topk_indices)}
        return topk_tensors(bank, self.topk_indices, self.topk_logits)

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.vector_bank.copy_(tensors["vector_bank"])
        if "logits" in tensors:
            kept_in = self.vector_bank if self.logits is None else self.logits.values
            self.logits = LogitTable(self.config, self.layout.parts).to(kept_in)
            self.select(tensors["logits"].to(kept_in))
            return
        self.topk_logits.copy_(selected_logits(tensors["topk_weights"]))
        self.topk_indices.copy_(tensors["topk_indices"])
        self.logits = None
