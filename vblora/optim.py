"""The optimiser that knows the logits. What it is given stands in `vblora.groups`."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from vblora.logits import LogitTable
from vblora.methods.selected import owner_of
from vblora.methods.vb_lora import VBLoRA
from vblora.whole import adapters_in, require_present


class AdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101) that trains VB-LoRA's logits exactly as dense AdamW over all h of them would.

    Only the k selected logits of a sub-vector have a gradient, but under AdamW an entry goes on moving by its
    momentum after it has left the selection, and weight decay shrinks all of them. So per sub-vector

        g = 0 but at the selected entries;  m, v, z: AdamW's update over all h entries;  then select again.

    Every other parameter is updated by torch.optim.AdamW itself. Gradient clipping and gradient accumulation
    work on the selected logits, whose norm is the dense gradient's norm. Entries that were never selected have no
    moments, and none are kept for them: the state_dict holds the moments of those in the adapter's table
    (`vblora.logits`), with their indices; the logits themselves are in the model's state_dict.

    Args:
        params: parameters or groups, as from `vblora.param_groups`.
        lr, betas, eps, weight_decay, foreach: as in torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        self._adapters: list[weakref.ref[VBLoRA]] | None = []
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim.AdamW.

        Raises:
            ValueError: logits without their table or not whole, or a setting that they have no use for.
        """
        super().add_param_group(param_group)
        for reference in (found := adapters_in(param_group["params"])):
            if (adapter := reference()) is not None:
                adapter.logit_table()
            if param_group.get("maximize") or param_group.get("amsgrad"):
                raise ValueError("maximize and amsgrad are not offered for VB-LoRA's logits")
        self._adapters = [*(self._adapters or []), *found]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_adapters", None)  # a copy finds them at its first step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of everything that has a gradient, then a new selection.

        Raises:
            ValueError: logits that were given have gone (`vblora.whole`).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._adapters is None:
            self._adapters = adapters_in(p for group in self.param_groups for p in group["params"])
        require_present(self._adapters, self.param_groups)
        selected = []
        for group in self.param_groups:
            for parameter in group["params"]:
                adapter = owner_of(parameter)
                if adapter is not None and parameter.grad is not None:
                    selected.append((group, parameter, adapter, parameter.grad))
                    parameter.grad = None  # so that torch's own step passes it over
        _torch_step()(self)
        for group, parameter, adapter, gradient in selected:
            parameter.grad = gradient
            self._step_logits(group, parameter, adapter)
        return loss

    def _step_logits(self, group: dict[str, Any], parameter: nn.Parameter, adapter: VBLoRA) -> None:
        assert parameter.grad is not None
        adapter.make_room()
        table = adapter.logit_table()
        gradient = parameter.grad.to(table.values.dtype)  # (N, k)
        state = self._logits_state(parameter, table)
        slots = table.slots  # (N, k)
        state["step"] += 1
        step = float(state["step"])
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])

        table.put(parameter.detach())  # the selected entries live in the parameter
        table.shrink(1 - lr * group["weight_decay"])
        mean = state["exp_avg"].mul_(beta1).scatter_add_(1, slots, gradient * (1 - beta1))
        square = state["exp_avg_sq"].mul_(beta2).scatter_add_(1, slots, gradient.square() * (1 - beta2))
        denominator = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        table.values.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
        adapter.take_selection()

    def _logits_state(self, parameter: nn.Parameter, table: LogitTable) -> dict[str, Any]:
        """The moments, slot by slot as the table is now. `indices` is the table's own tensor while they agree."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, device="cpu")
            state["exp_avg"] = torch.zeros_like(table.values)
            state["exp_avg_sq"] = torch.zeros_like(table.values)
        elif state["indices"] is not table.indices:
            saved, names = state["indices"], ("exp_avg", "exp_avg_sq")
            if not torch.equal(saved, table.indices[:, : saved.shape[1]]):
                table.include(saved, (state["exp_avg"] != 0) | (state["exp_avg_sq"] != 0))
                for name in names:
                    state[name] = table.arrange(saved, state[name])
            elif more := table.width - saved.shape[1]:
                for name in names:
                    state[name] = nn.functional.pad(state[name], (0, more))
        state["indices"] = table.indices
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim.AdamW. Moments of logits that have other slots in the model are moved to them.

        Raises:
            ValueError: the logits' moments are of another number of sub-vectors, or do not say whose they are.
        """
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        of_logits = {}
        for i, parameter in zip(saved, own, strict=False):  # PyTorch refuses other numbers of parameters
            moments = state_dict["state"].get(i)
            if not moments or owner_of(parameter) is None:
                continue
            of_logits[parameter] = moments
            if moments.get("indices") is None or len(moments["indices"]) != len(parameter):
                raise ValueError(
                    f"the optimiser's state has no moments for the {len(parameter)} sub-vectors of the adapter: it is "
                    "of another model, or of a version that kept all h of each; begin with a new optimiser"
                )
        super().load_state_dict(state_dict)
        for parameter, moments in of_logits.items():  # which PyTorch has turned into the parameter's type
            own = owner_of(parameter).logit_table().values
            for name, numbers in moments.items():
                if name != "step":
                    kind = own.dtype if numbers.is_floating_point() else numbers.dtype
                    self.state[parameter][name] = numbers.to(own.device, kind, copy=True)


def _torch_step() -> Callable[..., Any]:
    """torch.optim.AdamW's step without the step hooks PyTorch wraps around it: our own step has them already."""
    step = torch.optim.AdamW.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
