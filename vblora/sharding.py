"""Adapters of ours on several processes: alike on all of them, and whole where FSDP2 divides the base model.

The base model's weights are sharded; the adapter, which is small and whose optimiser needs it whole, is left out
(`ignored_params`) and kept on every process. FSDP does not look after what it leaves out, so the gradients are averaged
here, as DDP would.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vblora.adapter import Adapter
from vblora.methods import VBLoRA
from vblora.switch import Adapted


def prepare(adapted: Adapted, accelerator: Any) -> None:
    """Make accelerate's FSDP2 leave an adapter of ours whole, and average its gradients.

    Does nothing more without FSDP and DeepSpeed.

    Raises:
        ValueError: the processes' adapters differ (`require_equal`). FSDP 1, or DeepSpeed with VB-LoRA: both put
            parameters into flat pieces. Or FSDP or ZeRO-3 with another method: its parameters would be divided too, and
            are saved by one process here.
    """
    kind = str(accelerator.distributed_type)
    if not isinstance(adapted.adapter, Adapter):
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
    require_equal(adapted.adapter)
    if not kind.endswith("FSDP"):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP 1 divides the parameters into flat pieces: set fsdp_version: 2 in the configuration")
    plugin.ignored_modules = [adapted.adapter]
    average_gradients(adapted.adapter, lambda: accelerator.sync_gradients)


def average_gradients(adapter: Adapter, due: Callable[[], bool] = lambda: True) -> None:
    """From now on, average each gradient over all processes as soon as it is there, in the steps where it is due.

    With gradient accumulation only the last backward pass of a step is: the sum of all is averaged then. The first one
    compares the adapters of all processes, as `require_equal`, whose ValueError comes out of `backward`.
    """
    compared = False

    def average(parameter: Tensor) -> None:
        nonlocal compared
        if due() and parameter.grad is not None:
            if not compared:
                require_equal(adapter)
                compared = True
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(dist.get_world_size())

    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)


def require_equal(adapter: Adapter) -> None:
    """Refuse to train where the processes hold different adapters: call it on all of them, before the first step.

    Settings, layers, seed and a digest of all values are gathered, some hundred bytes from each process. Nothing is
    done where there is one process.

    Raises:
        ValueError: naming what differs, and the first two processes between which it does.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    described: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(described, _described(adapter))
    for name, first in described[0].items():
        for rank, other in enumerate(described):
            if other.get(name) != first:
                raise ValueError(
                    f"the processes hold different adapters: {name} is {first} on rank 0 and {other.get(name)} on rank "
                    f"{rank}; give attach the same settings and seed on all, or load the same files"
                )


def _described(adapter: Adapter) -> dict[str, str]:
    """What must be the same on all processes, by name."""
    settings = {name: repr(value) for name, value in dataclasses.asdict(adapter.config).items()}
    layers = "; ".join(f"{s.name} {s.in_features} x {s.out_features}" for s in adapter.shapes)
    return {
        **settings,
        "the digest of the layers": _digest([layers.encode()]),
        "init_seed": str(adapter.init_seed),
        "the digest of the values": _digest(_whole_values(adapter)),
    }


def _whole_values(adapter: Adapter) -> Iterator[bytes]:
    """The bytes of all tensors but those that are divided, or not there."""
    modules = [adapter, *adapter.saved.values()]
    for name, tensor in (pair for module in modules for pair in module.state_dict().items()):
        if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
            yield name.encode()
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
