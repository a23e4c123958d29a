"""A device of the tests' own beside the CPU, so that what a GPU would refuse is refused without one.

`install()` makes torch.device("second") known, through PyTorch's own interface for backends in Python. Its tensors are
plain torch.Tensor in this process's memory, and the CPU computes with them: values are right, to the bit. An operation
on a tensor there and one on the CPU is an error as it is on CUDA, which a tensor of no dimension alone escapes.
A process cannot take the device back: use it in one of its own (test_second_device.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.utils._pytree import tree_map

NAME = "second"
SET = torch.ops.aten.set_.source_Storage_storage_offset
_memory: dict[int, torch.UntypedStorage] = {}  # by address, for ever: tests are short and their tensors small
_library: list[torch.library.Library] = []


def install() -> torch.device:
    """Register the device.

    Raises:
        AttributeError: a release of PyTorch without that interface (before 2.10).
    """
    from torch.utils import backend_registration as registration

    class Module(registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

        def get_rng_state(self, device: Any = None) -> Tensor:
            return torch.get_rng_state()

        def set_rng_state(self, state: Tensor, device: Any = None) -> None:
            torch.set_rng_state(state)

    registration._setup_privateuseone_for_python_backend(NAME, Module())
    _library.append(torch.library.Library("_", "IMPL"))
    _library[0].fallback(_run, "PrivateUse1")
    of_others = torch.UntypedStorage.clone

    def clone(self: torch.UntypedStorage) -> torch.UntypedStorage:
        return _there(_memory[self.data_ptr()].clone()) if self.device.type == NAME else of_others(self)

    torch.UntypedStorage.clone = clone  # for deep copies of buffers
    return torch.device(NAME, 0)


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Every operation on tensors of the device: the CPU's, on the same memory."""
    if operator is torch.ops.aten._copy_from.default:  # which brings a tensor to the device, and back
        source, place = (_same_memory(one) if one.device.type == NAME else one for one in args[:2])
        place.copy_(source)
        return args[1]
    if operator is SET:
        return operator._op_dk(DispatchKey.CPU, *args)
    if any(one.alias_info is not None and not one.alias_info.is_write for one in operator._schema.returns):
        return operator._op_dk(DispatchKey.Meta, *args, **kwargs)  # a view: sizes and strides alone
    given: list[tuple[Tensor, Tensor]] = []

    def on_cpu(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if not isinstance(value, Tensor):
            return value
        if value.device.type == NAME:
            given.append((value, _same_memory(value)))
            return given[-1][1]
        if value.dim():
            raise RuntimeError(f"{operator}: tensors on {NAME} and on {value.device}")
        return value

    result = operator(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
    for mine, raw in given:
        if mine.shape != raw.shape:  # a place for results, which the operation has resized
            _fill(mine, raw)
    places = {id(raw): mine for mine, raw in given}

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return places[id(value)] if id(value) in places else _fill(_empty(value.dtype), value.contiguous())

    return tree_map(back, result)


def _empty(dtype: torch.dtype) -> Tensor:
    return torch._C._acc.create_empty_tensor([0], dtype)


def _fill(tensor: Tensor, raw: Tensor) -> Tensor:
    """Give a tensor of the device the memory of one on the CPU."""
    memory = raw.untyped_storage() if raw.untyped_storage().nbytes() else torch.UntypedStorage(8)
    return SET._op_dk(DispatchKey.CPU, tensor, _there(memory), raw.storage_offset(), raw.shape, raw.stride())


def _there(memory: torch.UntypedStorage) -> torch.UntypedStorage:
    """The same memory as the device's."""
    _memory[memory.data_ptr()] = memory
    return torch._C._construct_storage_from_data_pointer(memory.data_ptr(), torch.device(NAME, 0), memory.nbytes())


def _same_memory(tensor: Tensor) -> Tensor:
    """A tensor on the CPU over the memory of one on the device."""
    memory = _memory[tensor.untyped_storage().data_ptr()]
    raw = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return raw.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
