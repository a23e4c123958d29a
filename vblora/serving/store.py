"""Many adapters on one model at once: every row of a batch may have its own.

    store = vblora.AdapterStore(model, "adapters/")          # a folder of packed files, thousands of them
    with store.rows(["alice", None, "bob"]):                 # None: the base model
        model.generate(**batch)                              # a batch of three rows

An adapter stays packed, on disk or in memory, until a batch asks for it; then its factors are composed, and kept until
`max_composed` others were used since. In an adapted layer, row i of the batch gets

    y_i = base(x_i) + (x_i A_i^T) B_i^T

for all rows in two batched products, whatever methods, ranks and banks the adapters have: rows of a lower rank are
filled up with zeros. (S-LoRA and Punica serve LoRA so, by kernels of their own.)

Threads may share a store and its model. A block of `rows` holds for the thread (or the asyncio task) that entered it:
each has its own rows, and others see the base model meanwhile. So enter it in the thread that calls the model.
"""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vblora.base_weights import BaseSample, check_base, take_sample
from vblora.files import packed, shared_bank
from vblora.files.content import Content, check_heads
from vblora.files.match import find_layers
from vblora.hooks import no_tensor, require_plain
from vblora.serving.batch_dims import BatchDims
from vblora.targets import find_saved, head_tensors, weight_of

SUFFIX = ".safetensors"
SETTLED = 2 * 10**9  # ns after which a folder's time tells every later change: file systems' clocks tick coarsely


class Place(NamedTuple):
    """Where a factor pair goes: a layer, and which of its outputs."""

    layer: str
    start: int | None = None
    stop: int | None = None


Stamp = tuple[int, int, int]  # of a file: when it was written, its size and its number


class _Composed(NamedTuple):
    """An adapter ready to use: A (r, in) and B (out, r) by place, its heads by name, its file's stamp, and its size."""

    factors: dict[Place, tuple[Tensor, Tensor]]
    heads: dict[str, nn.Module]
    stamp: Stamp | None
    size: int


class AdapterStore:
    """Adapters by name for one model.

    Args:
        model: any model that the adapters were trained on; it stays the same object. No adapter need be attached.
        folder: holds NAME.safetensors (or NAME.vblora.safetensors), packed; all are known by their names, and read when
            first used, and again when they have been replaced. Shared banks lie in it too. `refresh` finds later files.
        batch_dim: which dimension of the model's inputs counts the rows, where it is not the first; of its layers it
            is found out (`vblora.serving.batch_dims`).
        max_composed: adapters whose factors are kept, besides those of the running batch; the least recently used
            go first.
        max_bytes: what the kept ones may take, as `resident_bytes` counts them; one that takes more is refused.
        strict_base: refuse, and do not only warn of, adapters made on another base (`vblora.base_weights`).
        check: is called with what each file holds before it is used, and refuses it by a ValueError.
        shorter: endings of names of the heads' tensors that may have fewer rows than the model's, as those of a
            classifier of fewer labels; the outputs that it lacks are NaN.

    Raises:
        ValueError: the folder does not exist, or the model is in a wrapper (`vblora.hooks.require_plain`).
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path | None = None,
        *,
        max_composed: int = 64,
        max_bytes: int | None = None,
        strict_base: bool = False,
        batch_dim: int | None = None,
        check: Callable[[Content], None] | None = None,
        shorter: tuple[str, ...] = (),
    ) -> None:
        for name, most in (("max_composed", max_composed), ("max_bytes", max_bytes)):
            if most is not None and most < 0:
                raise ValueError(f"{name} must be at least 0, not {most}")
        require_plain(model)
        self.model = model
        self.max_composed = max_composed
        self.max_bytes = max_bytes
        self.strict_base = strict_base
        self._check = check
        self._shorter = shorter
        self._sources: dict[str, Path | bytes] = {}
        self._composed: OrderedDict[str, _Composed] = OrderedDict()
        self._fits: dict[str, dict[str, Place]] = {}  # the places of the targets, by what decides them
        self._samples: dict[str, BaseSample | None] = {}  # of the model's weights, by the same
        self._hooked: dict[str, torch.utils.hooks.RemovableHandle] = {}
        self.batch_dims = BatchDims(batch_dim)
        self._looked_into: set[str] = set()  # modules whose layers' batch dimensions were looked for
        self._own_rows: ContextVar[_Rows | None] = ContextVar("rows", default=None)
        self._running: list[_Rows] = []  # of all threads
        self._lock = threading.RLock()  # over what the threads share: all but a batch's own rows
        self._folder = None if folder is None else Path(folder)
        self._of_folder: set[str] = set()  # the names that are known from the folder
        self._folder_time: int | None = None  # when it was last changed, as far as is known
        self._bank_of: Callable[[str], Tensor] | None = None
        if folder is not None:
            self._bank_of = partial(shared_bank.read_beside, Path(folder))
            self.refresh()

    # -- which adapters there are --------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def names(self) -> list[str]:
        """The adapters that are known, in the order in which they became so."""
        return list(self._sources)

    def add(self, name: str, source: str | Path | bytes) -> None:
        """Make an adapter known: a packed file, read when first used, or the content of one, kept in memory.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._sources:
            raise ValueError(f"there is an adapter {name!r} already: remove it first")
        self._sources[name] = source if isinstance(source, bytes) else Path(source)

    def refresh(self) -> None:
        """Look into the folder again: new files become known, and adapters whose files are gone are forgotten.

        Raises:
            ValueError: the folder does not exist.
        """
        if self._folder is None:
            return
        changed = self._folder.stat().st_mtime_ns if self._folder.is_dir() else -1
        if changed == self._folder_time and time.time_ns() - changed > SETTLED:
            return
        found = packed_files(self._folder)
        with self._lock:
            for name in self._of_folder - found.keys():
                del self._sources[name]
                self._composed.pop(name, None)
            self._of_folder = {name for name in found if name in self._of_folder or name not in self._sources}
            self._sources |= {name: found[name] for name in found if name in self._of_folder}
            self._folder_time = changed

    def remove(self, name: str) -> None:
        """Forget an adapter; its file stays.

        Raises:
            ValueError: there is none of this name, or the running batch uses it.
        """
        with self._lock:
            self._require(name)
            if any(name in rows.names for rows in self._running):
                raise ValueError(f"adapter {name!r} is in use")
            del self._sources[name]
            self._of_folder.discard(name)
            self._composed.pop(name, None)

    def stamp(self, name: str) -> Stamp | None:
        """What changes when an adapter's file is replaced; None where there is no file, or no such adapter."""
        source = self._sources.get(name)
        return _stamp(source) if isinstance(source, Path) else None

    def composed(self) -> int:
        """How many adapters' factors are kept at present."""
        return len(self._composed)

    def resident_bytes(self) -> int:
        """Bytes of the adapters in memory: packed ones, and the factors that are composed."""
        with self._lock:
            packed_bytes = sum(len(source) for source in self._sources.values() if isinstance(source, bytes))
            return packed_bytes + sum(one.size for one in self._composed.values())

    # -- using them ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within this block the model's batches have as many rows as there are names, each with its adapter.

        What a row is split into on the way (beams, positions) shares its adapter. Nothing is trained through it. It
        holds for this thread alone.

        Raises:
            ValueError: an unknown name, an adapter that is damaged or does not fit the model, or a block within
                another; in the block, a batch whose rows are no multiple of the names, or do not stand by themselves.
        """
        if self.own_rows() is not None:
            raise ValueError("rows() is in use in this thread: one batch at a time")
        if isinstance(names, str):
            raise ValueError(f"rows() takes a list of names, one for each row, not {names!r} alone")
        if not names:
            raise ValueError("rows() needs a name, or None, for each row of the batch")
        rows = None
        try:
            with self._lock:
                rows = _Rows(
                    list(names), {name: self._compose(name) for name in dict.fromkeys(names) if name is not None}
                )
                self._running.append(rows)
            before = self._own_rows.set(rows)
            try:
                yield
            finally:
                self._own_rows.reset(before)
        finally:
            with self._lock:
                self._running = [other for other in self._running if other is not rows]
                self._make_room()

    def check(self, name: str) -> Content:
        """What an adapter's file holds, if it could be used: all is checked, and nothing kept.

        Raises:
            ValueError: an unknown name, an adapter that is damaged or does not fit the model.
        """
        with self._lock:
            adapter = self._read(name)[0]
            own = self._samples[adapter.fingerprint]
        check_base(adapter.base_sample, own, adapter.shapes, f"adapter {name!r}", self.strict_base)
        return adapter

    def own_rows(self) -> _Rows | None:
        """The rows of the block that this thread is in."""
        return self._own_rows.get()

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._hooked.values():
            handle.remove()
        self._hooked.clear()
        self._composed.clear()
        self._fits.clear()
        self._samples.clear()

    def _require(self, name: str) -> Path | bytes:
        if name not in self._sources:
            raise ValueError(f"there is no adapter {name!r} among the {len(self._sources)} known")
        return self._sources[name]

    def _make_room(self) -> None:
        """Drop the least recently used until no more are kept than may be."""
        most = math.inf if self.max_bytes is None else self.max_bytes
        taken = sum(one.size for one in self._composed.values())
        while self._composed and (len(self._composed) > self.max_composed or taken > most):
            taken -= self._composed.popitem(last=False)[1].size

    def _read(self, name: str) -> tuple[Content, dict[str, Place], dict[str, nn.Module]]:
        """An adapter, the places of its factors, and its heads; all of it checked."""
        source = self._require(name)
        try:
            if isinstance(source, bytes):
                adapter = packed.loads(source, self._bank_of)
            else:
                self._require_inside(source)
                adapter = packed.read_for(self.model, source)
            if self._check is not None:
                self._check(adapter)
            if self.max_bytes is not None and adapter.factor_bytes > self.max_bytes:
                raise ValueError(f"it takes {adapter.factor_bytes:,} bytes, more than the {self.max_bytes:,} allowed")
            places, heads = self._places(adapter), self._heads(adapter)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from error
        return adapter, places, heads

    @torch.no_grad()
    def _compose(self, name: str) -> _Composed:
        source = self._require(name)
        stamp = None if isinstance(source, bytes) else _stamp(source)
        if name in self._composed and self._composed[name].stamp == stamp:
            self._composed.move_to_end(name)
            return self._composed[name]
        adapter, places, heads = self._read(name)
        own = self._samples[adapter.fingerprint]
        check_base(adapter.base_sample, own, adapter.shapes, f"adapter {name!r}", self.strict_base)
        try:
            factors = adapter.factors()
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from error
        for place in places.values():
            self._hook(place.layer, _LayerHook(self, place.layer))
        for module_name in heads:
            self._hook(module_name, _HeadHook(self, module_name))
        ready = {}
        for target, pair in factors.items():
            device = weight_of(self.model.get_submodule(places[target].layer)).device
            ready[places[target]] = (pair[0].to(device), pair[1].to(device))
        tensors = [t for pair in ready.values() for t in pair]
        tensors += [t for head in heads.values() for t in head.state_dict().values()]
        size = sum(t.numel() * t.element_size() for t in tensors)
        self._composed[name] = _Composed(ready, heads, stamp, size)
        self._composed.move_to_end(name)
        return self._composed[name]

    def _require_inside(self, source: Path) -> None:
        """Refuse a file of the folder that is a link out of it; what `add` named may lie anywhere."""
        folder = self._folder
        if folder is not None and source.parent == folder and not source.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{source} is a link out of the folder")

    def _places(self, adapter: Content) -> dict[str, Place]:
        """Where the adapter's factors go, by target."""
        if adapter.config.target_parameters:
            raise ValueError(
                "it adapts experts (target_parameters), where the tokens of all rows are mixed: serve it alone with "
                "vblora.load, or as LoRA (vblora export)"
            )
        if adapter.fingerprint not in self._fits:
            targets = find_layers(self.model, adapter, "it")
            self._samples[adapter.fingerprint] = take_sample(self.model, targets, adapter.shapes, adapter.outputs)
            self._fits[adapter.fingerprint] = {
                target: Place(target)
                if part == slice(None)
                else Place(target.rpartition(".")[0], part.start, part.stop)
                for target, part in adapter.outputs.items()
            }
        return self._fits[adapter.fingerprint]

    def _heads(self, adapter: Content) -> dict[str, nn.Module]:
        """The adapter's heads by name: modules of its own, as the model's are other threads' too."""
        saved = find_saved(self.model, adapter.config) if adapter.heads else {}
        tensors = self._as_long(adapter.heads, head_tensors(saved))
        heads: dict[str, nn.Module] = {}
        for module_name, module in saved.items():
            own = module.state_dict()
            heads[module_name] = _bare_copy(module)
            mine = {key: tensors[f"{module_name}.{key}"].to(own[key]) for key in own}
            heads[module_name].load_state_dict(mine, assign=True)
        return heads

    def _as_long(self, heads: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's heads, checked, with rows of NaN where they may have fewer than the model's."""
        rows = {key: len(heads[key]) for key in wanted if key.endswith(self._shorter) and key in heads}
        short = {key: wanted[key][:count] for key, count in rows.items() if count < len(wanted[key])}
        if short and len(set(rows.values())) > 1:
            raise ValueError(f"{', '.join(rows)} differ in their numbers of labels: {list(rows.values())}")
        check_heads(heads, wanted | short)
        missing = {
            key: heads[key].new_full((len(wanted[key]) - len(heads[key]), *heads[key].shape[1:]), math.nan)
            for key in short
        }
        return heads | {key: torch.cat([heads[key], rest]) for key, rest in missing.items()}

    def _hook(self, module_name: str, hook: Any) -> None:
        if module_name not in self._hooked:
            module = self.model.get_submodule(module_name)
            self._hooked[module_name] = module.register_forward_hook(hook, with_kwargs=True)
            self._looked_into.clear()
            while module_name:
                module_name = module_name.rpartition(".")[0]
                key = f"{module_name} before"  # no module's name
                if key not in self._hooked:
                    parent = self.model.get_submodule(module_name)
                    before = _BeforeHook(self, module_name)
                    self._hooked[key] = parent.register_forward_pre_hook(before, with_kwargs=True)

    def look_into(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a batch goes through a module: find out, once, which dimensions its layers have the rows in."""
        rows = self.own_rows()
        if rows is None or len(rows.names) == 1 or name in self._looked_into:
            return
        self.batch_dims.learn(module, args, kwargs, len(rows.names))
        inside = {f"{name}.{part}".strip(".") for part, _ in module.named_modules()}
        self._looked_into |= {part for part in inside if f"{part} before" in self._hooked} | {name}


def packed_files(folder: Path) -> dict[str, Path]:
    """The packed files of a folder by their adapters' names; NAME.vblora.safetensors comes before NAME.safetensors.

    Raises:
        ValueError: the folder does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    paths = [path for path in sorted(folder.glob(f"*{SUFFIX}")) if not path.name.endswith(shared_bank.SUFFIX)]
    return {path.name.removesuffix(SUFFIX).removesuffix(".vblora"): path for path in paths}


def _stamp(path: Path) -> Stamp | None:
    """What changes when a file is replaced; None where there is none, which its reader says better."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
PRE_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")


def _bare_copy(module: nn.Module) -> nn.Module:
    """The module again, without its hooks (which hold this store, and with it the model) and with the same tensors."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for part in module.modules():
        memo |= {id(hooks): type(hooks)() for hooks in (getattr(part, name) for name in (*HOOKS, *PRE_HOOKS))}
    return copy.deepcopy(module, memo)


class _Rows:
    """The adapters of one batch, row by row, stacked layer by layer when first needed."""

    def __init__(self, names: list[str | None], adapters: dict[str, _Composed]) -> None:
        self.names = names
        self.adapters = adapters
        self._stacked: dict[tuple[Place, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.places: dict[str, list[Place]] = {}  # by layer
        for composed in adapters.values():
            for place in composed.factors:
                of_layer = self.places.setdefault(place.layer, [])
                if place not in of_layer:
                    of_layer.append(place)

    def factors(self, place: Place, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A transposed (rows, in, r) and B transposed (rows, r, out); zeros for rows without an adapter here."""
        key = (place, dtype)
        if key not in self._stacked:
            pairs = [None if name is None else self.adapters[name].factors.get(place) for name in self.names]
            some_a, some_b = next(pair for pair in pairs if pair is not None)
            r = max(pair[0].shape[0] for pair in pairs if pair is not None)
            a = some_a.new_zeros(len(pairs), some_a.shape[1], r)
            b = some_b.new_zeros(len(pairs), r, some_b.shape[0])
            for row, pair in enumerate(pairs):
                if pair is not None:
                    a[row, :, : pair[0].shape[0]] = pair[0].T
                    b[row, : pair[1].shape[1]] = pair[1].T
            self._stacked[key] = (a.to(dtype), b.to(dtype))
        return self._stacked[key]

    def split(self, tensor: Tensor, dim: int) -> Tensor:
        """The rows, which are in dimension `dim` of (..., features), as (rows, all else, features)."""
        return tensor.movedim(dim, 0).reshape(len(self.names), -1, tensor.shape[-1])


class _BeforeHook:
    """Before a module that has adapted layers or heads in it."""

    def __init__(self, store: AdapterStore, name: str) -> None:
        self.store = store
        self.name = name

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.store.look_into(self.name, module, args, kwargs)


class _LayerHook:
    """After an adapted layer: add each row's own B A x to the output."""

    def __init__(self, store: AdapterStore, layer: str) -> None:
        self.store = store
        self.layer = layer

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        rows = self.store.own_rows()
        if rows is None or self.layer not in rows.places:
            return output
        if not isinstance(output, Tensor):
            raise ValueError(f"{self.layer} {no_tensor(module, output)}")
        x = args[0] if args else next(iter(kwargs.values()))
        if self.store.batch_dims.is_looking(self.layer, x):
            return output
        dim = self.store.batch_dims.of(self.layer, x, len(rows.names))
        x = rows.split(x, dim).to(output.dtype)  # (rows, s, in)
        result = rows.split(output, dim)  # (rows, s, out)
        with torch.autocast(output.device.type, enabled=False):
            for place in rows.places[self.layer]:
                a, b = rows.factors(place, output.dtype)
                hidden = torch.bmm(x, a)  # (rows, s, r)
                if place.start is None:
                    result = torch.baddbmm(result, hidden, b)
                else:
                    result = result.clone() if result.data_ptr() == output.data_ptr() else result
                    result[..., place.start : place.stop].baddbmm_(hidden, b)
        return result.reshape(output.movedim(dim, 0).shape).movedim(0, dim)


class _HeadHook:
    """After a head: the outputs of the rows whose adapter has one of its own."""

    def __init__(self, store: AdapterStore, name: str) -> None:
        self.store = store
        self.name = name

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        rows = self.store.own_rows()
        if rows is None:
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        if self.store.batch_dims.is_looking(self.name, x):
            return output
        dim = self.store.batch_dims.of(self.name, x, len(rows.names))
        each, result = x.shape[dim] // len(rows.names), output.clone()  # beams of one row
        for name, adapter in rows.adapters.items():
            if self.name in adapter.heads:
                own = [row * each + beam for row, of in enumerate(rows.names) if of == name for beam in range(each)]
                mine = torch.tensor(own, device=x.device)
                result.index_copy_(dim, mine, _of_rows(module, adapter.heads[self.name], args, kwargs, dim, mine))
        return result


def _of_rows(module: nn.Module, head: nn.Module, args: Any, kwargs: dict[str, Any], dim: int, mine: Tensor) -> Tensor:
    """The head's output for these rows, in the mode that the model's own is in."""

    def part(value: Any) -> Any:
        return value.index_select(dim, mine) if isinstance(value, Tensor) else value

    if head.training != module.training:
        head.train(module.training)
    return head(*map(part, args), **{key: part(value) for key, value in kwargs.items()})
