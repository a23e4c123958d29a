"""Adapters of ours on a base model that FSDP2 divides over several processes.

The base model's weights are sharded; the adapter, which is small and whose optimiser needs it whole, is left out
(`ignored_params`) and kept on every process. FSDP does not look after what it leaves out, so the gradients are averaged
here, as DDP would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vblora.methods import VBLoRA
from vblora.switch import Adapted


def prepare(adapted: Adapted, accelerator: Any) -> None:
    """Make accelerate's FSDP2 leave an adapter of ours whole, and average its gradients.

    Does nothing without FSDP and DeepSpeed.

    Raises:
        ValueError: FSDP 1, or DeepSpeed with VB-LoRA: both put parameters into flat pieces. Or FSDP or ZeRO-3 with
            another method: its parameters would be divided too, and are saved by one process here.
    """
    kind = str(accelerator.distributed_type)
    if not isinstance(adapted.adapter, nn.Module):
        stage = accelerator.state.deepspeed_plugin.zero_stage if kind.endswith("DEEPSPEED") else 0
        if kind.endswith("FSDP") or stage == 3:
            raise ValueError(
                "FSDP and ZeRO-3 are for this project's own adapters: other methods go with DDP or ZeRO-2 "
                "(configs/ddp.yaml, configs/deepspeed_zero2.yaml)"
            )
        return
    if kind.endswith("DEEPSPEED") and isinstance(adapted.adapter, VBLoRA):
        raise ValueError(
            "DeepSpeed divides the parameters into flat pieces, and VB-LoRA's optimiser needs its logits whole: use "
            "FSDP2 or DDP (configs/fsdp2.yaml, configs/ddp.yaml)"
        )
    if not kind.endswith("FSDP"):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP 1 divides the parameters into flat pieces: set fsdp_version: 2 in the configuration")
    plugin.ignored_modules = [adapted.adapter]
    average_gradients(adapted.adapter, lambda: accelerator.sync_gradients)


def average_gradients(adapter: nn.Module, due: Callable[[], bool] = lambda: True) -> None:
    """From now on, average each gradient over all processes as soon as it is there, in the steps where it is due.

    With gradient accumulation only the last backward pass of a step is: the sum of all is averaged then.
    """

    def average(parameter: torch.Tensor) -> None:
        if due() and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(dist.get_world_size())

    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)
