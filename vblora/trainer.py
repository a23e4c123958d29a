"""Hugging Face's Trainer with VB-LoRA's optimiser, and checkpoints that hold the adapter alone."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vblora import sharding
from vblora.adapter import Adapter
from vblora.integrations import AdapterTraining, optimiser_name
from vblora.io import writing
from vblora.methods import VBLoRA
from vblora.sampling import LengthGroupedSampler, LongestFirstSampler
from vblora.switch import Adapted, AnyAdapter

# AdamW by bitsandbytes, for methods without selected logits: in pages that leave the GPU when it is full, or in 8 bits.
OTHER_OPTIMISERS = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw_bnb_8bit")


class AdapterTrainer(AdapterTraining, Trainer):
    """Trains an adapted model of any method.

    Beside what `AdapterTraining` changes, five things differ from Trainer: --optim may name one of bitsandbytes' for a
    method that has no logits; rows grouped by length (--train_sampling_strategy group_by_length) come in shuffled
    batches; DDP does not send the buffers of one of our adapters in every step; a run that goes on from a checkpoint
    ends as if it had not been interrupted, evaluations included; and a batch that is divided has the whole one's loss.

    Args:
        adapted: what `vblora.switch.apply_method` gave.
        rates: learning rates beside `args.learning_rate`, as `vblora.param_groups` takes them.
        args: the training arguments.
        others: passed on to Trainer.
    """

    def __init__(
        self, adapted: Adapted, rates: Mapping[str, float | None], args: TrainingArguments, **others: Any
    ) -> None:
        _check_arguments(args, adapted)
        args = copy.copy(args)
        args.push_to_hub = False  # it would upload every checkpoint; `vblora_experiments.publishing` pushes the result
        if isinstance(adapted.adapter, Adapter) and args.ddp_broadcast_buffers is None:
            # VB-LoRA's follow from the seed and from what is trained, which are the same everywhere. Sending them in
            # every step would cost more than the gradients.
            args.ddp_broadcast_buffers = False
        self._adapted, self.recipe = adapted, adapted.recipe
        if adapted.recipe is not None:
            missing = {name: rate for name, rate in adapted.recipe.rates.items() if rates.get(name) is None}
            # A bank that is frozen has no rate.
            kept = {n: r for n, r in missing.items() if n != "lr_vector_bank" or _trains_bank(adapted.adapter)}
            rates = {**rates, **kept}
            decay = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
            self.recipe = adapted.recipe.trained_with(rates, args.warmup_steps, args.max_grad_norm, decay)
            if args.process_index == 0:
                print(self.recipe)
        super().__init__(model=adapted.model, args=args, rates=rates, **others)
        # Trainer takes every model whose forward has **kwargs as one that divides its loss by the items of the whole
        # batch. Of ours the causal ones do, and label smoothing does; a classifier gives the mean of the rows it sees.
        self._divides_loss = self.label_smoother is not None or _is_causal(adapted.model)
        if not self._divides_loss:
            self.model_accepts_loss_kwargs = True  # so that the items are counted, for `compute_loss`
        self.add_callback(TrainingClock())
        self.add_callback(SavedAfterItsEpoch())
        sharding.prepare(adapted, self.accelerator)

    @property
    def train_seconds(self) -> float:
        """Seconds spent training, over all sessions of the run."""
        # Asked of the callback that is there now: Trainer makes a new one when it resumes.
        return next(c.seconds for c in self.callback_handler.callbacks if isinstance(c, TrainingClock))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a part of a batch as its share of the whole batch's mean.

        The shares of all parts add up to that mean however the batch is divided, over accumulation steps and over
        processes, whose gradients DDP averages: share = mean over the part * its items / all items * processes.
        """
        if self._divides_loss or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        items = inputs["labels"].ne(-100).sum()
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = loss * items * processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _init_training_state(self, max_steps: int, steps: int, epochs: int, *others: Any) -> tuple[int, int]:
        """As Trainer's; a run that is at its last step has no epoch left, also where --max_steps ends within one."""
        trained = super()._init_training_state(max_steps, steps, epochs, *others)
        return (epochs, 0) if self.state.global_step >= max_steps else trained

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and not _is_own(self.args):
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(self.groups(self._adapted.model), **settings)
        return super().create_optimizer(model)

    def find_adapter(self, model: nn.Module) -> AnyAdapter:
        return self._adapted.adapter

    def check_optimiser(self) -> None:
        """Done before the trainer is made: see `_check_arguments`."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self._by_length:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(_lengths(dataset), batch, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return (
            LongestFirstSampler(_lengths(eval_dataset)) if self._by_length else super()._get_eval_sampler(eval_dataset)
        )

    @property
    def _by_length(self) -> bool:
        return self.args.train_sampling_strategy == "group_by_length"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer; on a full disk one line says so, and the part of a checkpoint that was written is removed."""
        directory = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        whole = (directory / TRAINER_STATE_NAME).exists()
        try:
            with writing(directory):
                super()._save_checkpoint(model, trial)
        except OSError:
            if not whole:
                shutil.rmtree(directory, ignore_errors=True)
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if isinstance(self.adapter, Adapter):
            super()._save(output_dir, state_dict)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, KeptWithCheckpoints):
                    callback.write(Path(output_dir or str(self.args.output_dir)))
            return
        arguments, self.args = self.args, self.arguments_to_keep()
        try:
            Trainer._save(self, output_dir, state_dict)  # PEFT's methods, and full fine-tuning
        finally:
            self.args = arguments

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if isinstance(self.adapter, Adapter):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            Trainer._load_from_checkpoint(self, resume_from_checkpoint, model)


def _is_causal(model: nn.Module) -> bool:
    """Whether this is one of transformers' causal language models, PEFT's wrapper aside."""
    base_of: Any = getattr(model, "get_base_model", lambda: model)
    base = base_of()
    named = type(base).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return named or getattr(base, "loss_type", None) == "ForCausalLM"


def _lengths(dataset: Any) -> list[int]:
    return [len(ids) for ids in dataset["input_ids"]]


def _trains_bank(adapter: AnyAdapter) -> bool:
    return isinstance(adapter, VBLoRA) and adapter.vector_bank.requires_grad


def _is_own(args: TrainingArguments) -> bool:
    return optimiser_name(args).startswith("adamw_torch")


def _check_arguments(args: TrainingArguments, adapted: Adapted) -> None:
    """Refuse what this trainer would silently do otherwise."""
    name = optimiser_name(args)
    if not _is_own(args):
        if name not in OTHER_OPTIMISERS:
            raise ValueError(f"--optim {name} is not offered: adamw_torch or one of {', '.join(OTHER_OPTIMISERS)}")
        if isinstance(adapted.adapter, VBLoRA):
            raise ValueError(
                f"--optim {name} does not know VB-LoRA's logits, and its bank is small: leave it out (vblora.AdamW)"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f"--optim {name} needs bitsandbytes: pip install bitsandbytes")
    if args.load_best_model_at_end:
        raise ValueError("--load_best_model_at_end does nothing: the best epoch's adapter is kept in best/")


class KeptWithCheckpoints(TrainerCallback):
    """A callback with a file of its own in every checkpoint."""

    def write(self, directory: Path) -> None:
        """Write the file into a checkpoint's directory."""
        raise NotImplementedError


class SavedAfterItsEpoch(TrainerCallback):
    """A checkpoint at the last step of an epoch is written after what is logged and evaluated at the epoch's end.

    Trainer would write it before, and going on from it would begin the next epoch: what ends the last one (its
    evaluation, its entry in a log) would be lost. Going on, the evaluation before any training is not done again.
    """

    waiting = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.waiting = False
        if state.global_step:
            args.eval_on_start = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ends = control.should_training_stop or float(state.epoch or 0).is_integer()
        if control.should_save and ends:
            control.should_save, self.waiting = False, True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.waiting:
            control.should_save, self.waiting = True, False


class TrainingClock(TrainerCallback, ExportableState):
    """Seconds spent in epochs, without the evaluations between them, over all sessions of one run."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._began: float | None = None  # None between epochs

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._stop()
        self._began = None

    def state(self) -> dict[str, Any]:
        self._stop()  # a checkpoint within an epoch has the seconds up to it
        return {"args": {"seconds": self.seconds}, "attributes": {}}

    def _stop(self) -> None:
        if self._began is not None:
            now = time.perf_counter()
            self.seconds, self._began = self.seconds + now - self._began, now


class KeepBest(TrainerCallback):
    """Saves the adapter whenever an evaluation beats all before it, as the paper takes each run's best epoch."""

    def __init__(self, adapter: AnyAdapter, metric: str, directory: Path, form: str = "topk") -> None:
        self.adapter = adapter
        self.form = form
        self.metric = f"eval_{metric}"
        self.directory = directory

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        scores = [entry[self.metric] for entry in state.log_history if self.metric in entry]
        if scores and scores[-1] > max(scores[:-1], default=float("-inf")):
            self.adapter.save(str(self.directory), form=self.form)
