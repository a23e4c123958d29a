"""Attach an adapter to a model; save, load, merge and detach it. Written once, for every method.

A method gives each adapted layer two factors, A (r x in) and B (out x r). How they come of its parameters stands in its
configuration (`vblora.config.AdapterConfig`), and what they do to a layer's output in `vblora.forward`. The formats of
`vblora.files` are imported by the functions that read or write a file: attaching and training need none of them.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from vblora.config import FORMS, AdapterConfig, VBLoRAConfig
from vblora.hooks import device_of, install_hooks, require_plain, warn_of_experts, warn_of_idle_names
from vblora.merging import Mergeable, stand_aside, stand_in, with_tied
from vblora.shapes import Count, LayerShape, check_rank
from vblora.targets import (
    find_saved,
    find_targets,
    head_tensors,
    layer_shapes,
    output_slice,
)

if TYPE_CHECKING:
    from vblora.files.content import Content, FileContent


@torch.inference_mode(False)  # the adapter's own tensors must be normal ones, to be watched and trained
def attach(model: nn.Module, config: AdapterConfig, *, name: str | None = None, seed: int | None = None) -> Adapter:
    """Attach an adapter to `model` in place and freeze everything that it does not train.

    An adapted layer then gives layer(x) + B A dropout(x), with A (r, in) and B (out, r) made by the method.

    Args:
        model: any model of nn.Linear, Conv1D or bitsandbytes layers. It stays the same object.
        config: VBLoRAConfig, TiedLoRAConfig or LoRAXSConfig.
        name: attribute of the model that holds the adapter; "<method>_adapter" unless given.
        seed: seed of the initial values; drawn from PyTorch's generator unless given, and kept in
            `adapter.init_seed`.

    Returns:
        The adapter, a sub-module of the model.

    Raises:
        ValueError: no layer matches, a layer cannot be adapted, the name is taken, or the model is in a wrapper, such
            as torch.compile's. The model is as before.
    """
    require_plain(model)
    adapter_class = Adapter.methods.get(type(config))
    if adapter_class is None:
        known = ", ".join(sorted(c.__name__ for c in Adapter.methods))
        raise ValueError(f"attach takes one of {known}, not {type(config).__name__}")
    targets = find_targets(model, config)
    warn_of_idle_names(model, config)
    warn_of_experts(model, config, targets)
    saved = with_tied(model, find_saved(model, config))
    if len(saved) > len(find_saved(model, config)):
        config = replace(config, modules_to_save=list(saved))
    if seed is None:
        seed = int(torch.randint(2**31 - 1, (), device="cpu"))
    if not isinstance(seed, int):
        raise ValueError(f"seed must be a whole number, not {seed!r}")
    with torch.device("cpu"):  # whatever the caller's default is: `_install` moves it to where the layers compute
        adapter = adapter_class(config, targets, seed)
    return install(model, adapter, name, saved)


@torch.inference_mode(False)
def install(model: nn.Module, adapter: Adapter, name: str | None, saved: dict[str, nn.Module]) -> Adapter:
    """Put a ready adapter into the model; what `attach` and `vblora.load` end with."""
    name = name or f"{adapter.config.method}_adapter"
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} cannot be the name of an adapter: it becomes an attribute of the model")
    if hasattr(model, name):
        raise ValueError(f"the model already has {name!r}: detach it first, or use another name")
    adapter._install(model, name, saved)
    return adapter


def load(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str | None = None,
    trainable: bool = False,
    strict_base: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Adapter:
    """Attach to `model` the adapter in a directory, in a packed file or on the hub, in any form that this project or
    PEFT's VBLoRA writes.

    Everything is checked before the model is touched.

    Args:
        model: the base model the adapter was trained on.
        directory: what `save`, or PEFT's `save_pretrained`, wrote; or a packed file; or a name on the hub, "user/name",
            where there is no such path here.
        name: attribute of the model that will hold the adapter; as in `attach`.
        trainable: have VB-LoRA's logits that a top-k form lacks drawn again, so that it can be trained on: see
            `VBLoRA.redraw_logits`. The seed is the recorded one, or 0 where there is none (PEFT's files).
        strict_base: refuse, and do not only warn of, a file made on another base (`vblora.base_weights`).
        revision: a branch, tag or commit on the hub; its main branch unless given.
        subfolder: where in the directory or repository the adapter is.

    Raises:
        ValueError: the files are damaged, hold something else, or do not fit the model, or the hub does not give them;
            the message names what is wrong. The model is as it was.
    """
    from vblora.files.reading import read_for
    from vblora.files.remote import local_path

    require_plain(model)
    found = read_for(model, local_path(directory, revision, subfolder), strict_base)
    with torch.inference_mode(False), torch.device("cpu"):
        adapter = Adapter.methods[type(found.config)](found.config, found.targets, None)
        install(model, adapter, name, found.saved)
    adapter.take_over(found.content, redraw=trainable)
    return adapter


def restore(adapter: Adapter, directory: str | Path, *, heads: bool = True, redraw: bool = False) -> None:
    """Put the values in a directory, or a packed file, into an adapter that is attached already, as when training is
    resumed.

    Without `heads` the `modules_to_save` stay as they are, as when another task starts from this adapter. VB-LoRA's
    top-k form lacks most logits: with `redraw` they are drawn again, as in `load(..., trainable=True)`.

    Raises:
        ValueError: as in `load`, or the settings differ, or it is the top-k form. The adapter is as it was.
    """
    from vblora.files.reading import read_values

    content = read_values(
        adapter.home[0], Path(directory), adapter.config, adapter.targets, adapter.saved if heads else None
    )
    if isinstance(adapter.config, VBLoRAConfig) and content.form != "full" and not redraw:
        raise ValueError(
            f'{directory} holds the top-k form; to train on it must be the full one (form="full"), '
            "or its missing logits drawn again (redraw=True)"
        )
    adapter.take_over(content, redraw=redraw)


class Adapter(Mergeable):
    """The adapter of one model. Methods derive from it; users get one from `vblora.attach` or `vblora.load`.

    Attributes:
        config: its settings.
        targets: the adapted layers by name; a layer of `split_modules` comes once for each of its parts, and of
            `target_parameters` each expert (`vblora.experts.Expert`).
        outputs: which of its layer's outputs each target adapts.
        shapes: their widths, in the same order.
        init_seed: the seed its initial values were drawn from; None where they came from a file.
    """

    methods: ClassVar[dict[type[AdapterConfig], type[Adapter]]] = {}
    groups: ClassVar[dict[str, str]] = {}
    """The group of `vblora.param_groups` that a parameter is in, by its name; for those not
    named, "adapter" for matrices and "scales" for vectors."""

    def __init_subclass__(cls, config: type[AdapterConfig] | None = None) -> None:
        """`class VBLoRA(Adapter, config=VBLoRAConfig)` makes a method known to `attach`."""
        super().__init_subclass__()
        if config is not None:
            Adapter.methods[config] = cls

    def __init__(self, config: AdapterConfig, targets: Mapping[str, nn.Module], seed: int | None) -> None:
        super().__init__()
        self.config = config
        self.init_seed = seed
        self.targets = dict(targets)  # a plain dict, so that the layers do not become sub-modules of the adapter
        self.outputs = {name: output_slice(name, module, config) for name, module in self.targets.items()}
        self.shapes: list[LayerShape] = layer_shapes(self.targets, config)
        check_rank(config.r, self.shapes)
        self.saved_names: list[str] = []  # modules of `modules_to_save`
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._trainable_before: set[str] = set()  # before the first adapter of the model

    # -- what a method may write (see also `AdapterConfig`, where the rest of a method is) --------------------------

    def tensors(self, form: str) -> dict[str, Tensor]:
        """The tensors of a file of this form, as `config.spec` describes them."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over the tensors of a file, already checked against `config.spec`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])

    def make_trainable(self, seed: int) -> None:
        """Make up for what a top-k file lacks: nothing, but for VB-LoRA."""

    @torch.no_grad()
    def take_over(self, content: FileContent, *, redraw: bool) -> None:
        """Take over a file's tensors, heads and seed, all of them checked; `redraw` as in `restore`."""
        self.init_seed = content.init_seed
        self.forget()
        with torch.inference_mode(False):
            self.load_tensors(content.native)
            if redraw:
                self.make_trainable(content.init_seed or 0)
        own = head_tensors(self.saved)
        for key, tensor in content.heads.items():
            own[key].copy_(tensor)

    # -- what users call -----------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The attribute of the model that holds this adapter."""
        return self.home[1]

    def layer_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each layer by name, in float32 or what is wider, without gradient."""
        with torch.no_grad():
            pairs = self.factors(self.current().tensors)
        return {shape.name: (a, b.T) for shape, (a, b) in zip(self.shapes, pairs, strict=True)}

    @property
    def saved(self) -> dict[str, nn.Module]:
        """The modules of `modules_to_save` as the model has them now, by their names there."""
        model, _ = self.home
        names = dict(model.named_modules(remove_duplicate=False)) if self.saved_names else {}
        if missing := [name for name in self.saved_names if name not in names]:
            raise ValueError(f"the model has no {', '.join(missing)} any more, which modules_to_save name")
        return {name: names[name] for name in self.saved_names}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base model alone. Modules of `modules_to_save` stay as they are: they are trained in place."""
        if self.merged:
            raise ValueError("a merged adapter cannot be switched off: unmerge it first")
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def detach(self) -> None:
        """Take the adapter off. A merged adapter stays merged into the weights; else the base model is back."""
        model, name = self.home
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        delattr(model, name)
        others = self._others()
        if not others:
            stand_aside(model)
        kept = _parameter_ids(*others, *(module for other in others for module in other.saved.values()))
        for parameter_name, parameter in model.named_parameters():
            if parameter.is_floating_point() and id(parameter) not in kept:
                parameter.requires_grad_(not others and parameter_name in self._trainable_before)
        self.home = None

    def stored_parameters(self) -> Count:
        """What the adapter stores, without the modules of `modules_to_save`: see `vblora.shapes.Count`."""
        return self.config.count(self.shapes)

    def content(self, form: str = "topk") -> Content:
        """All that a file of this form holds.

        Raises:
            ValueError: no such form, the adapter is attached to no model, or a layer was replaced since.
        """
        from vblora.files.content import content_of

        if form not in FORMS:
            raise ValueError(f"form is one of {', '.join(FORMS)}, not {form!r}")
        self.require_layers()
        return content_of(self, form)

    def save(self, directory: str | Path, *, form: str = "topk", format: str = "auto", card: bool = True) -> None:
        """Write the adapter, with its `modules_to_save`, into a directory.

        Args:
            directory: made if missing; an adapter in it is replaced, each file in one step.
            form: "topk" to keep and use; "full" to go on training.
            format: "peft" for PEFT's VBLoRA files, "native" for our own, "auto" for PEFT's where it fits.
            card: also a model card, README.md (`vblora.files.card`); one that somebody else wrote is left as it is.

        Raises:
            ValueError: a form or format that cannot hold this adapter. Nothing is written then.
        """
        from vblora.files.directory import write_directory

        write_directory(self.content(form), directory, format, card)

    def push_to_hub(self, repository: str, **settings: Any) -> str:
        """Upload what `save` writes to a repository of the hub, and return the address of the commit.

        `settings` are those of `vblora.files.remote.push`: revision, subfolder, private, token, commit_message, form,
        format.
        """
        from vblora.files import remote

        return remote.push(self, repository, **settings)

    def pack(self, path: str | Path, **settings: Any) -> int:
        """Write the adapter, with its `modules_to_save`, as one small file.

        `settings` are those of `vblora.files.packed.write`: bank, weights, heads, selection. Returns the file's bytes.
        """
        from vblora.files import packed

        return packed.write(self.content(), path, **settings)

    def export_lora(self, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write the adapter as plain LoRA, exactly, for PEFT, vLLM and SGLang: see `vblora.files.lora`."""
        from vblora.files import lora

        content = self.content()
        lora.export(content, directory, self.layer_factors(), dtype=dtype, task_type=content.task_type)

    def start_from(self, directory: str | Path, *, redraw: bool = False) -> None:
        """Take over the values of a saved adapter of the same settings, but not its heads: see `restore`."""
        restore(self, directory, heads=False, redraw=redraw)

    def head_parameters(self) -> int:
        """Numbers in the modules of `modules_to_save`, which the paper's counts leave out."""
        return sum(p.numel() for p in nn.ModuleList(self.saved.values()).parameters())  # those tied to others once

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in PyTorch; nothing while merged: the weights have it, and would get it twice."""
        return kwargs.get("destination", {}) if self.merged else super().state_dict(*args, **kwargs)

    # -- how it sits in the model --------------------------------------------------------------------------------

    def _install(self, model: nn.Module, name: str, saved: dict[str, nn.Module]) -> None:
        self.saved_names = list(saved)
        self.home = (model, name)
        others = self._others()
        kept = _parameter_ids(*others, *(module for other in others for module in other.saved.values()))
        heads = _parameter_ids(*saved.values())
        self._trainable_before = (
            others[0]._trainable_before if others else {n for n, p in model.named_parameters() if p.requires_grad}
        )
        for parameter in model.parameters():
            if parameter.is_floating_point() and (id(parameter) in heads or id(parameter) not in kept):
                parameter.requires_grad_(id(parameter) in heads)
        self.train(model.training)
        self.to(device_of(next(iter(self.targets.values()))))
        model.add_module(name, self)
        layers = [(self.targets[self.shapes[group[0]].name], group) for group in self._indices_by_layer()]
        self._handles += install_hooks(self, model, layers, saved)
        stand_in(model)

    def _indices_by_layer(self) -> list[list[int]]:
        """The numbers of the targets that are in one layer, layer by layer: one, or the parts of a split one."""
        by_layer: dict[int, list[int]] = {}
        for index, module in enumerate(self.targets.values()):
            by_layer.setdefault(id(module), []).append(index)
        return list(by_layer.values())


def _parameter_ids(*modules: nn.Module) -> set[int]:
    return {id(p) for module in modules for p in module.parameters()}


def save(
    adapter: Adapter, directory: str | Path, *, form: str = "topk", format: str = "auto", card: bool = True
) -> None:
    """As `Adapter.save`."""
    adapter.save(directory, form=form, format=format, card=card)
