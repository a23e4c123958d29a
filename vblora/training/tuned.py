"""A fine-tuned model, ready to generate: a base model with a run's adapter, or with one from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vblora
from vblora.files import read_json
from vblora.storage import CONFIG_FILE, METHOD_KEY
from vblora.training import causal, plans, records

TRAINING_FILE = "training.json"  # what every causal training writes when it has come to its end


@dataclass(frozen=True)
class Tuned:
    """Where a model comes from.

    Attributes:
        base: the base model's name or folder, also of the tokenizer.
        weights: the base's, or the folder of fully fine-tuned ones.
        adapter: folder of an adapter, this project's or PEFT's, or a packed file.
        bits, dtype: as `causal.load_model` takes them.
        plan: what the run was made with; None where it is no run.
    """

    base: str
    weights: str
    adapter: Path | None = None
    bits: int = 16
    dtype: str = "auto"
    plan: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        model: str,
        *,
        adapter: Path | None = None,
        base: str | None = None,
        bits: int | None = None,
        dtype: str | None = None,
    ) -> Tuned:
        """What a command line names.

        Args:
            model: the output folder of a training, which stands for its base model with its adapter; or a model's
                name on the hub, or its folder.
            adapter: the adapter's folder or packed file, where `model` is no run.
            base: a run's base model, where it is not the one that the run names.
            bits, dtype: other than the run's.

        Raises:
            ValueError: an adapter or a base model that cannot be had, or another one than the run's.
        """
        run = Path(model)
        if (run / records.PLAN_FILE).exists():
            return cls._of_run(run, adapter, base, bits, dtype)
        if base:
            raise ValueError(f"--model_name_or_path goes with the folder of a run, and {run} is none")
        if adapter and not adapter.is_file() and not (adapter / CONFIG_FILE).is_file():
            raise ValueError(f"--adapter {adapter}: there is no {CONFIG_FILE} in it")
        return cls(model, model, adapter, bits or 16, dtype or "auto")

    @classmethod
    def _of_run(cls, run: Path, adapter: Path | None, base: str | None, bits: int | None, dtype: str | None) -> Tuned:
        if adapter:
            raise ValueError(f"{run} is a run with an adapter of its own: leave --adapter out")
        if not (run / TRAINING_FILE).exists():
            if (run / records.RECORD_FILE).exists():
                raise ValueError(f"{run} is a run of a classifier, not of a language model")
            raise ValueError(f"{run} holds no finished run: train it to its end first")
        plan, last = read_json(run / records.PLAN_FILE), run / "last"
        name = base or str(plan["model_name_or_path"])
        if before := plan.get("model_fingerprint"):
            if not Path(name).is_dir():
                raise ValueError(
                    f"the run was made on a local model called {name}: name its folder with --model_name_or_path"
                )
            if records.folder_fingerprint(Path(name)) != before:
                raise ValueError(f"{name} is not the model that the run was made on: its files differ")
        full = plan["method"] == "full"
        bits, dtype = bits or plan.get("bits", 16), dtype or plan.get("dtype", "auto")
        return cls(name, str(last) if full else name, None if full else last, bits, dtype, plan)

    def settings(self) -> dict[str, Any]:
        """What decides the texts: the base model's name and, of what is on this machine, a fingerprint."""
        folders = {"model": Path(self.weights), "adapter": self.adapter}
        prints = {
            f"{name}_fingerprint": records.folder_fingerprint(folder)
            for name, folder in folders.items()
            if folder is not None and folder.exists()
        }
        return {"model": plans.model_name(self.base), **prints, "bits": self.bits, "dtype": self.dtype}

    def load(self, merge: bool = False) -> Any:
        """The model in evaluation mode, on this process's device; with `merge` the adapter is in its weights.

        Raises:
            ValueError: a model or an adapter that cannot be had, or do not fit each other.
        """
        model = causal.load_model(self.weights, self.dtype, self.bits)
        if self.bits == 16:  # quantised, it is there already
            model = model.to(causal.own_device())
        if self.adapter is not None:
            model = with_adapter(model, self.adapter, merge)
        return model.eval()


def with_adapter(model: Any, folder: Path, merge: bool) -> Any:
    """The model with the adapter of this folder or packed file; a method of PEFT's wraps it unless it is merged."""
    config = {} if folder.is_file() else read_json(folder / CONFIG_FILE)
    if folder.is_file() or METHOD_KEY in config or config.get("peft_type") == "VBLORA":
        adapter = vblora.load(model, folder)
        if merge:
            adapter.merge(reversible=False)
            adapter.detach()
        return model
    import peft

    adapted = peft.PeftModel.from_pretrained(model, str(folder))
    return adapted.merge_and_unload() if merge else adapted
