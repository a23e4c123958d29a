"""The k selected logits in training: whose they are, what others write to them, and an adapter's copies.

`adapter` is a `vblora.methods.vb_lora.VBLoRA` throughout.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# Which adapter a parameter of selected logits belongs to, so that the optimiser finds it however the parameter
# reached it (groups, model.parameters(), a copy of the model).
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()
_adapters: weakref.WeakSet = weakref.WeakSet()  # all that own some, also after others were put in their place


def register_owner(selected: nn.Parameter, adapter: Any) -> None:
    """Note that `selected` holds the selected logits of `adapter`."""
    _owners[selected] = weakref.ref(adapter)
    _adapters.add(adapter)


def owner_of(parameter: Tensor) -> Any:
    """The adapter whose selected logits `parameter` holds, if any."""
    reference = _owners.get(parameter)
    return reference() if reference is not None else None


def owners() -> list[Any]:
    """All adapters that have selected logits."""
    return list(_adapters)


class Copies(weakref.WeakSet):
    """An adapter and its deep copies, which hold one such set; one that was unpickled begins a new one."""

    reselected = False  # `vblora.AdamW` has moved the selection of one of them

    def __deepcopy__(self, memo: dict[int, Any]) -> Copies:
        return self

    def __reduce__(self) -> Any:
        return Copies, (), {"reselected": self.reselected}


@torch.no_grad()
def check_written(adapter: Any, in_training: bool) -> None:
    """Notice that something else than `vblora.AdamW` wrote the selected logits, and so left the selection as it was.

    An optimiser that knows nothing of the selection freezes it: that is warned of once, in training. What is written
    without a backward pass, where `vblora.AdamW` moves the selection, is an average of weights as a rule. Its columns
    stand for other entries at other times: it is refused where it is used, which is not in training.

    Told by the values, as fused optimisers change parameters without PyTorch's version counter noticing.

    Raises:
        ValueError: the logits are an average, or another optimiser's after ours.
    """
    stepped = adapter.went_backward and not adapter.selection_kept
    if adapter.warned or (in_training and not stepped):
        return
    if not (stepped or adapter.copies.reselected) or as_selected(adapter):
        return
    if not stepped:
        raise ValueError(
            "topk_logits of this adapter were written by something else than vblora.AdamW: an average of weights mixes "
            "entries that are not the same (take vblora.AveragedModel), and another optimiser leaves the selection as "
            "it was (call adapter.reselect() after its steps)"
        )
    adapter.warned = True
    warnings.warn(
        "the logits were stepped by another optimiser than vblora.AdamW, so the selection stays as it "
        "was; train with vblora.AdamW(vblora.param_groups(model, ...)), or call adapter.reselect()",
        stacklevel=3,
    )


@torch.no_grad()
def as_selected(adapter: Any) -> bool:
    """Whether the selected logits are what the table has; so are those that are not whole, or no numbers any more."""
    table, selected = adapter.logits, adapter.topk_logits.detach()
    if table is None or type(selected) is not Tensor or selected.is_meta:
        return True
    same = torch.equal(table.values.gather(1, table.slots).to(selected.dtype), selected)
    return same or not bool(selected.isfinite().all())


def widen_copies(adapter: Any) -> None:
    """Widen the tables of an adapter's deep copies to its own table's width, which changes no logit.

    What walks over a model and a copy of it side by side, as averages of weights do, finds equal shapes.
    """
    width = adapter.logit_table().width
    for copy in list(adapter.copies):
        if copy.logits is not None and copy.logits.width < width:
            copy.logits.widen(width)
