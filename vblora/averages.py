"""Averages of an adapted model's weights over training: exponential moving averages and SWA."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from vblora.logits import LogitTable
from vblora.methods.vb_lora import VBLoRA


class AveragedModel(swa_utils.AveragedModel):
    """torch.optim.swa_utils.AveragedModel that averages VB-LoRA's logits entry by entry.

    Over steps t, with the weights c_t that the average has (equal ones, or an exponential moving average's):

        bank = sum_t c_t bank_t;    logit_j = sum_t c_t logit_jt for each of the h entries of each sub-vector,

    and the k largest of these are selected: what averaging all parameters of the dense form gives. PyTorch's own class
    would average the k selected logits column by column, which are other entries at other steps. Everything else, heads
    and other methods' factors, is averaged as PyTorch does.

    Args: PyTorch's: `model`, `device`, `avg_fn`, `multi_avg_fn` (as `get_ema_multi_avg_fn(0.999)`), `use_buffers`.
        Call `update_parameters(model)` after a step of `vblora.AdamW`; `module` is the averaged model, whose adapter is
        saved as any other.
    """

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model as it is now into the average."""
        begun, number = bool(self.n_averaged > 0), self.n_averaged.clone()
        pairs = list(zip(_adapters(self.module), _adapters(model), strict=True))
        means = [own.logits for own, _ in pairs]
        for own, new in pairs:
            # PyTorch averages the selected logits, and copies or averages the table: into one that is given away.
            own.logits = copy.deepcopy(new.logit_table()).to(own.vector_bank.device)
        super().update_parameters(model)
        for (own, new), mean in zip(pairs, means, strict=True):
            current = copy.deepcopy(new.logit_table()).to(own.vector_bank.device)
            current.put(new.topk_logits.to(current.values.device))
            if begun:
                assert mean is not None
                current = self._mean(mean, current, number)
            own.logits = current
            own.take_selection()

    def _mean(self, mean: LogitTable, current: LogitTable, number: Tensor) -> LogitTable:
        """The average with one more table in it."""
        if not _match(mean, current):
            mean, current = _whole(mean), _whole(current)
        averaged, new = [mean.values, mean.shrunk], [current.values, current.shrunk]
        if self.multi_avg_fn is not None:
            self.multi_avg_fn(averaged, new, number.to(mean.values.device))
        else:
            avg_fn = self.avg_fn or swa_utils.get_swa_avg_fn()
            for tensor, other in zip(averaged, new, strict=True):
                tensor.copy_(avg_fn(tensor, other, number.to(tensor.device)))
        mean.reached.copy_(torch.maximum(mean.reached, current.reached))
        mean.make_room()
        return mean


def _adapters(model: nn.Module) -> list[VBLoRA]:
    """Those whose logits are trained."""
    return [module for module in model.modules() if isinstance(module, VBLoRA) and module.logits is not None]


def _match(one: LogitTable, other: LogitTable) -> bool:
    """Whether both draw the same entries, and have them in the same slots; the narrower one is widened."""
    if not torch.equal(one.seed, other.seed):
        return False
    width = max(one.width, other.width)
    for table in (one, other):
        if table.width < width:
            table.widen(width)
    return torch.equal(one.indices, other.indices)


def _whole(table: LogitTable) -> LogitTable:
    """The same logits with a slot for each entry, in order."""
    whole = LogitTable(table.config, table.parts).to(table.values)
    whole.take_over(table.dense(), table.indices.gather(1, table.slots), None)
    return whole
