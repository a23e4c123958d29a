"""Whether an optimiser has VB-LoRA's logits as it needs them: whole, and the adapter's own parameter.

FSDP2's `fully_shard` puts DTensors in the place of parameters, FSDP 1 and DeepSpeed's ZeRO flat pieces of many. An
optimiser does not know these for logits, and the selection would silently stay as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from vblora.methods.selected import owner_of, owners, register_owner
from vblora.methods.vb_lora import VBLoRA

WAY_OUT = (
    "leave the adapter out: fully_shard(..., ignored_params=set(adapter.parameters())) with "
    "vblora.sharding.average_gradients(adapter), or use DDP"
)


def require_whole(adapter: VBLoRA) -> None:
    """Refuse an adapter whose logits something has divided or taken away; a new parameter that is whole is noted.

    Raises:
        ValueError: with what to do instead.
    """
    logits = adapter._parameters.get("topk_logits")
    if logits is None:
        raise ValueError(f"the logits of VB-LoRA are part of a flat piece, as FSDP 1 makes: {WAY_OUT}")
    if _is_divided(logits):
        raise ValueError(
            f"the logits of VB-LoRA are divided over processes ({type(logits).__name__}), and its optimiser needs them "
            f"whole to select: {WAY_OUT}"
        )
    if logits.shape != adapter.topk_indices.shape:
        raise ValueError(
            f"the logits of VB-LoRA have the shape {tuple(logits.shape)} and not {tuple(adapter.topk_indices.shape)}: "
            f"they are a part of themselves, as FSDP 1 makes with use_orig_params: {WAY_OUT}"
        )
    if owner_of(logits) is not adapter:
        register_owner(logits, adapter)


def adapters_in(parameters: Iterable[nn.Parameter]) -> list[weakref.ref[VBLoRA]]:
    """The adapters whose logits are among these parameters of an optimiser.

    Raises:
        ValueError: as `require_whole`.
    """
    by_logits = {id(adapter._parameters.get("topk_logits")): adapter for adapter in owners()}
    found = []
    for parameter in parameters:
        if any(name.endswith("topk_logits") for name in getattr(parameter, "_fqns", ())):  # FSDP 1's FlatParameter
            raise ValueError(f"the logits of VB-LoRA are part of a flat piece, as FSDP 1 makes: {WAY_OUT}")
        if (adapter := by_logits.get(id(parameter))) is not None:
            require_whole(adapter)
            found.append(weakref.ref(adapter))
    return found


def require_present(adapters: Iterable[weakref.ref[VBLoRA]], groups: Iterable[dict[str, Any]]) -> None:
    """Refuse to step where an adapter's logits, which the optimiser once had, have gone from its groups.

    Raises:
        ValueError: as `require_whole`, or other tensors are in their place.
    """
    present = {id(parameter) for group in groups for parameter in group["params"]}
    for reference in adapters:
        adapter = reference()
        if adapter is None:
            continue
        own = adapter._parameters.values()
        if own and not any(p is not None and p.requires_grad for p in own):
            continue
        require_whole(adapter)
        if adapter.topk_logits.requires_grad and id(adapter.topk_logits) not in present:
            raise ValueError(
                "the logits of VB-LoRA are not among the optimiser's parameters any more, so that the selection would "
                f"stay as it is: under DeepSpeed's ZeRO, which puts flat pieces there, {WAY_OUT}; after "
                "load_state_dict(assign=True) make the optimiser anew"
            )


def _is_divided(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_local_tensor")  # DTensor, told without importing torch.distributed
