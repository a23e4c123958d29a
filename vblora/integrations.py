"""Adapters in other people's trainers: transformers' Trainer and its kind, TRL's SFTTrainer, DPOTrainer, GRPOTrainer.

    class Trainer(vblora.integrations.AdapterTraining, trl.SFTTrainer): ...

    trainer = Trainer(model=model, args=..., train_dataset=..., rates=chosen.rates)

Nothing of transformers or TRL is imported here. docs/integrations.md has what was run with which.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vblora.adapter import Adapter, restore
from vblora.groups import param_groups
from vblora.methods import SelectionVBLoRA, VBLoRA
from vblora.optim import AdamW


class AdapterTraining:
    """Put before a trainer of the Trainer family, it trains an adapter that is attached to the model.

    The optimiser is `vblora.AdamW` over `vblora.param_groups`. A checkpoint holds the adapter in its full form and not
    the model, so that it has the adapter's size, and a run that goes on from it ends as one that was not interrupted.
    `load_best_model_at_end` loads the best checkpoint's adapter. The log has the learning rate of each group, and for
    VB-LoRA what `selection_statistics` gives, with the changes of a step since the last entry.

    Args:
        rates: learning rates beside the head's `args.learning_rate`, as `vblora.param_groups` or a recipe's `rates`
            has them.
        others: the trainer's own.

    Raises:
        ValueError: no adapter of this project in the model, or `args.optim` names another optimiser.
    """

    _group_rates: Mapping[str, float] = {}  # by the names that the log has them under

    def __init__(self, *positional: Any, rates: Mapping[str, float | None] | None = None, **others: Any) -> None:
        self.rates = dict(rates or {})
        super().__init__(*positional, **others)
        this: Any = self
        self.adapter: Any = self.find_adapter(this.model)
        selects = isinstance(self.adapter, (VBLoRA, SelectionVBLoRA))
        self._selection = SelectionChanges(self.adapter) if selects else None
        self.check_optimiser()
        self.groups(this.model)  # so that a wrong rate is refused now

    def find_adapter(self, model: nn.Module) -> Any:
        """The adapter that checkpoints are of."""
        found = [module for module in model.modules() if isinstance(module, Adapter)]
        if len(found) != 1:
            raise ValueError(f"the model has {len(found)} adapters, and this trainer takes one: vblora.attach first")
        return found[0]

    def check_optimiser(self) -> None:
        """Refuse an optimiser that would be silently left out."""
        args: Any = self.args  # type: ignore[attr-defined]
        name = optimiser_name(args)
        if not name.startswith("adamw_torch"):
            raise ValueError(f"--optim {name} does not know VB-LoRA's logits: leave it out (vblora.AdamW is used)")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """`vblora.param_groups` by the training arguments and `rates`."""
        args: Any = self.args  # type: ignore[attr-defined]
        return param_groups(model, args.learning_rate, weight_decay=args.weight_decay, **self.rates)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        this: Any = self
        if this.optimizer is None:
            betas = (this.args.adam_beta1, this.args.adam_beta2)
            this.optimizer = AdamW(self.groups(model or this.model), betas=betas, eps=this.args.adam_epsilon)
        return this.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's.

        Raises:
            ValueError: the loss is no finite number; what has been saved stays as it is.
        """
        if self._selection is not None:
            self._selection.look(self.state.global_step)  # type: ignore[attr-defined]
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not torch.isfinite(loss):
            raise self._diverged(f"loss is {float(loss)}")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As Trainer's, which asks for it before each step.

        Raises:
            ValueError: it is no finite number, also where the loss still is. (A GradScaler leaves such steps out.)
        """
        this: Any = self
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        if norm is not None and this.accelerator.scaler is None and not math.isfinite(norm):
            raise self._diverged(f"gradient's norm is {float(norm)}")
        return norm

    def _diverged(self, how: str) -> ValueError:
        this: Any = self
        rates = ", ".join(f"{g['name']} {g['lr']:.3g}" for g in self.groups(this.model))
        return ValueError(
            f"the {how} at step {this.state.global_step + 1}: the training has diverged with the learning rates "
            f"{rates}. Lower them, and give another --output_dir; what was saved before is left"
        )

    # --- The log ------------------------------------------------------------------------------------------------------

    def _get_learning_rate(self) -> float:
        this: Any = self
        groups = enumerate(this.optimizer.param_groups)
        self._group_rates = {f"learning_rate_{group.get('name', at)}": float(group["lr"]) for at, group in groups}
        return super()._get_learning_rate()  # type: ignore[misc]

    def log(self, logs: dict[str, float], *others: Any, **more: Any) -> None:
        if "learning_rate" in logs:  # the first group's
            logs.update(self._group_rates)
            if self._selection is not None:
                this: Any = self
                logs.update(self._selection.statistics(this.state.global_step))
        super().log(logs, *others, **more)  # type: ignore[misc]

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        this: Any = self
        directory = Path(output_dir or str(this.args.output_dir))
        is_checkpoint = directory.name.startswith("checkpoint-")  # which nobody publishes
        self.adapter.save(str(directory), form="full", card=not is_checkpoint)
        torch.save(self.arguments_to_keep(), directory / "training_args.bin")  # as Trainer does; never read back here
        if this.processing_class is not None:
            this.processing_class.save_pretrained(directory)

    def arguments_to_keep(self) -> Any:
        """The training arguments without the hub's token, which belongs in no file."""
        this: Any = self
        kept = copy.copy(this.args)
        kept.hub_token = None
        return kept

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's, whose learning rates are the checkpoint's from here on: others would do nothing.

        Raises:
            ValueError: the checkpoint trains at other rates.
        """
        this: Any = self
        mine = list(getattr(this.lr_scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        kept = list(getattr(this.lr_scheduler, "base_lrs", ()))
        if mine != kept:
            raise ValueError(
                f"{checkpoint} trains at the learning rates {_rates(kept)}, and this run at {_rates(mine)}: give the "
                "same, or start anew in another output folder"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore(self.adapter, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        this: Any = self
        restore(self.adapter, this.state.best_model_checkpoint)


class BaseReference:
    """Put between `AdapterTraining` and trl.GRPOTrainer, it makes beta's reference the model without its adapter.

    TRL itself would load a second base model. `args.beta` is what it is in TRL; with 0 there is no reference.

        class Trainer(AdapterTraining, BaseReference, trl.GRPOTrainer): ...
    """

    def __init__(self, model: Any, reward_funcs: Any, args: Any, *positional: Any, **others: Any) -> None:
        without = copy.copy(args)
        without.beta = 0.0
        super().__init__(model, reward_funcs, without, *positional, **others)  # type: ignore[call-arg]
        this: Any = self
        this.args.beta = self.beta = args.beta
        # What TRL asks for the reference's probabilities: the adapter stands for the model without it.
        self.ref_model: Any = this.find_adapter(this.model) if self.beta else None

    def _get_per_token_logps_and_entropies(self, model: Any, *positional: Any, **others: Any) -> Any:
        of: Any = super()._get_per_token_logps_and_entropies  # type: ignore[misc]
        if self.ref_model is None or model is not self.ref_model:
            return of(model, *positional, **others)
        this: Any = self
        with self.ref_model.disabled():
            return of(this.model, *positional, **others)


def _rates(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:.4g}" for rate in dict.fromkeys(rates))


def optimiser_name(args: Any) -> str:
    """What `--optim` says."""
    return str(getattr(args.optim, "value", args.optim))


class SelectionChanges:
    """Counts in a training how often sub-vectors come to select other vectors, on the adapter's device."""

    def __init__(self, adapter: VBLoRA | SelectionVBLoRA) -> None:
        self.adapter = adapter
        self._last: tuple[int, Tensor] | None = None  # of the last look: its step, and the selection then
        self._logged: tuple[int, Tensor] | None = None  # of the last entry in the log, at first of the first look
        self._changes: Tensor | int = 0  # since then

    @torch.no_grad()
    def look(self, step: int) -> Tensor:
        """Compare with the look before, and give the selection (N, k), sorted. A second look at a step counts for none.

        Args:
            step: how many steps have been made.
        """
        if self._last is not None and step == self._last[0]:
            return self._last[1]
        now = self.adapter.step_selection().sort(-1).values
        if self._last is not None:
            self._changes = self._changes + (now != self._last[1]).any(-1).sum()
        self._last = (step, now)
        self._logged = self._logged or self._last
        return now

    def statistics(self, step: int) -> dict[str, float]:
        """What `selection_statistics` gives, and the share of sub-vectors that change in a step: since the last."""
        now = self.look(step)
        assert self._logged is not None
        since, before = self._logged
        found = selection_statistics(self.adapter, before)
        found["selection_changes_per_step"] = float(self._changes) / len(now) / max(step - since, 1)
        self._logged, self._changes = (step, now), 0
        return found


@torch.no_grad()
def selection_statistics(adapter: VBLoRA | SelectionVBLoRA, before: Tensor | None = None) -> dict[str, float]:
    """How an adapter of VB-LoRA selects: numbers for a log.

    Args:
        adapter: in a model.
        before: the indices (N, k) of an earlier moment, as `adapter.step_selection()` gives them.

    Returns:
        bank_in_use: the share of the bank's vectors that some sub-vector selects.
        selection_entropy: of a sub-vector's weights, their mean; from 0 (one vector) to 1 (k equal weights).
        selection_changed: the share of sub-vectors that select other vectors than before; missing without `before`.
    """
    indices, weights = adapter.selection()
    k = indices.shape[1]
    entropy = torch.special.entr(weights.float()).sum(-1).mean() / math.log(k) if k > 1 else 0.0
    found = {
        "bank_in_use": indices.unique().numel() / adapter.config.num_vectors,
        "selection_entropy": float(entropy),
    }
    if before is not None:
        same = indices.sort(-1).values == before.to(indices).sort(-1).values
        found["selection_changed"] = float((~same.all(-1)).float().mean())
    return found


def reference_of(model: nn.Module) -> nn.Module:
    """The base model once more for DPO's `ref_model`, with the very tensors of `model`: it takes no memory of its own.

    To be made before `vblora.attach`, which leaves it alone: its outputs stay the base model's.

    Raises:
        ValueError: the model has an adapter already, which would act in the copy too.
    """
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise ValueError("the model has an adapter already: make the reference before vblora.attach")
    tensors: Iterable[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()


def lightning_callback() -> Any:
    """A callback for Lightning's Trainer: its checkpoints hold what is trained (the adapter and heads), not the base.

    The module that is fitted must have the adapted model in it. `fit(module, ckpt_path=...)` goes on from such a
    checkpoint; the base model is the one that the module is made with.
    """
    import lightning

    class AdapterCheckpoint(lightning.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.strict_loading = False  # the base's tensors are not in the file

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            kept = trained_names(pl_module)
            checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in kept}

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            kept, found = trained_names(pl_module), set(checkpoint["state_dict"])
            if different := sorted(kept ^ found):
                raise ValueError(
                    f"the checkpoint is of another adapter or other heads: {', '.join(different[:3])} differ"
                )

    return AdapterCheckpoint()


def trained_names(model: nn.Module) -> set[str]:
    """The names in the model's state of all that is trained: adapters with their buffers, heads, other weights."""
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    for prefix, module in model.named_modules(remove_duplicate=False):  # a module may have it as a field of its own too
        if isinstance(module, Adapter):
            names |= {f"{prefix}.{name}" for name in module.state_dict()}
            saved = {id(t) for one in module.saved.values() for t in one.state_dict(keep_vars=True).values()}
            names |= {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in saved}
    return names
