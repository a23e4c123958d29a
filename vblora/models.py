"""Language models with an adapter: loading them in 16, 8 or 4 bits, and writing them merged, or as plain LoRA."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vblora.adapter import load as load_adapter
from vblora.config import AdapterConfig
from vblora.files import convert, gguf_lora, packed
from vblora.files.content import Content
from vblora.files.directory import CONFIG_FILE, METHOD_KEY
from vblora.files.lora import export
from vblora.hub import from_hub
from vblora.io import folder_fingerprint, new_directory, read_json, writing
from vblora.methods import LoRAXSConfig
from vblora.targets import find_saved, find_targets

FLAG = "--model_name_or_path DIR"
BITS = (16, 8, 4)
# The files of a run's folder that say which model was trained.
PLAN_FILE = "run.json"
RECORD_FILE = "record.json"
TRAINING_FILE = "training.json"  # what every causal training writes when it has come to its end


def load_model(name: str, dtype: str = "auto", bits: int = 16, device_map: str | None = None) -> Any:
    """The causal model of this name or folder.

    Args:
        name: on the hub, or a folder.
        dtype: of the weights that are not quantised, and of the computation: "auto" is the one they are kept in.
        bits: 4 is NF4 with double quantisation (QLoRA), 8 is LLM.int8(), both by bitsandbytes; 16 is as `dtype` says.
        device_map: accelerate's: "auto" spreads the model over all GPUs and, beyond them, the main memory. Unless
            given, a quantised model goes to this process's own device.

    Raises:
        ValueError: the model cannot be had or lacks weights, or what quantisation needs is missing.
    """
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else torch_dtype(dtype)}
    if bits != 16:
        options["quantization_config"] = quantisation(bits, torch.bfloat16 if dtype == "auto" else torch_dtype(dtype))
        device_map = device_map or own_device()
    if device_map is not None:
        options["device_map"] = device_map if device_map in ("auto", "balanced", "sequential") else {"": device_map}
    from transformers import AutoModelForCausalLM

    options["output_loading_info"] = True
    loaded: Any = from_hub(lambda: AutoModelForCausalLM.from_pretrained(name, **options), name, FLAG)
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:5])}: they would be random numbers, frozen and not saved, "
            "and others at every load. It is no causal language model, or its files are not complete"
        )
    return model


def quantisation(bits: int, compute: torch.dtype) -> Any:
    """bitsandbytes' configuration: NF4 with double quantisation, or 8 bits.

    Raises:
        ValueError: other bits, or bitsandbytes is missing.
    """
    from transformers import BitsAndBytesConfig

    if bits not in BITS[1:]:
        raise ValueError(f"--bits must be 16, 8 or 4, not {bits}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"--bits {bits} needs bitsandbytes: pip install bitsandbytes")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def torch_dtype(name: str) -> torch.dtype:
    """The type of this name.

    Raises:
        ValueError: there is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"--dtype {name} names no floating point type, such as float32, bfloat16 or float16")
    return found


def own_device() -> str:
    """The device of this process."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer, with a token to pad with, which is never looked at."""
    from transformers import AutoTokenizer

    tokenizer = from_hub(lambda: AutoTokenizer.from_pretrained(name), name, FLAG)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no end token, which every row needs")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_name(name_or_path: str) -> str:
    """What a record calls a model: its name on the hub, or its folder's name without the path to it."""
    return Path(name_or_path).name if Path(name_or_path).exists() else name_or_path


@dataclass(frozen=True)
class Tuned:
    """Where a model comes from.

    Attributes:
        base: the base model's name or folder, also of the tokenizer.
        weights: the base's, or the folder of fully fine-tuned ones.
        adapter: folder of an adapter, this project's or PEFT's, or a packed file.
        bits, dtype: as `load_model` takes them.
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
        if (run / PLAN_FILE).exists():
            return cls._of_run(run, adapter, base, bits, dtype)
        if base:
            raise ValueError(f"--model_name_or_path is given with the folder of a run, and {run} is not one")
        if adapter and not adapter.is_file() and not (adapter / CONFIG_FILE).is_file():
            raise ValueError(f"--adapter {adapter}: there is no {CONFIG_FILE} in it")
        return cls(model, model, adapter, bits or 16, dtype or "auto")

    @classmethod
    def _of_run(cls, run: Path, adapter: Path | None, base: str | None, bits: int | None, dtype: str | None) -> Tuned:
        if adapter:
            raise ValueError(f"{run} is a run with an adapter of its own: leave --adapter out")
        if not (run / TRAINING_FILE).exists():
            if (run / RECORD_FILE).exists():
                raise ValueError(f"{run} is a run of a classifier, not of a language model")
            raise ValueError(f"{run} holds no finished run: train it to its end first")
        plan, last = read_json(run / PLAN_FILE), run / "last"
        name = base or str(plan["model_name_or_path"])
        if before := plan.get("model_fingerprint"):
            if not Path(name).is_dir():
                raise ValueError(
                    f"the run was made on a local model called {name}: name its folder with --model_name_or_path"
                )
            if folder_fingerprint(Path(name)) != before:
                raise ValueError(f"{name} is not the model that the run was made on: its files differ")
        full = plan["method"] == "full"
        bits, dtype = bits or plan.get("bits", 16), dtype or plan.get("dtype", "auto")
        return cls(name, str(last) if full else name, None if full else last, bits, dtype, plan)

    def settings(self) -> dict[str, Any]:
        """What decides the texts: the base model's name and, of what is on this machine, a fingerprint."""
        folders = {"model": Path(self.weights), "adapter": self.adapter}
        prints = {
            f"{name}_fingerprint": folder_fingerprint(folder)
            for name, folder in folders.items()
            if folder is not None and folder.exists()
        }
        return {"model": model_name(self.base), **prints, "bits": self.bits, "dtype": self.dtype}

    def load(self, merge: bool = False) -> Any:
        """The model in evaluation mode, on this process's device; with `merge` the adapter is in its weights.

        Raises:
            ValueError: a model or an adapter that cannot be had, or do not fit each other.
        """
        model = load_model(self.weights, self.dtype, self.bits)
        if self.bits == 16:  # quantised, it is there already
            model = model.to(own_device())
        if self.adapter is not None:
            model = with_adapter(model, self.adapter, merge)
        return model.eval()


def with_adapter(model: Any, folder: Path, merge: bool) -> Any:
    """The model with the adapter of this folder or packed file; a method of PEFT's wraps it unless it is merged."""
    config = {} if folder.is_file() else read_json(folder / CONFIG_FILE)
    if folder.is_file() or METHOD_KEY in config or config.get("peft_type") == "VBLORA":
        adapter = load_adapter(model, folder)
        if merge:
            adapter.merge(reversible=False)
            adapter.detach()
        return model
    import peft

    adapted = peft.PeftModel.from_pretrained(model, str(folder))
    return adapted.merge_and_unload() if merge else adapted


def write_merged(tuned: Tuned, output: Path, original_weights: bool = False) -> Path:
    """Write base and adapter as one model, with its tokenizer, in sharded safetensors.

    An adapter that was trained on quantised weights is added to what those stand for (they are dequantised first), so
    that the model is the one that was trained; with `original_weights` it is added to the weights as published.

    Raises:
        ValueError: there is no adapter, or the output exists.
    """
    adapter = tuned.adapter
    if adapter is None:
        raise ValueError(f"{tuned.base}: there is no adapter to merge")
    if output.exists():
        raise ValueError(f"{output} exists: remove it, or name another folder")
    if original_weights:
        tuned = replace(tuned, bits=16)
    model = load_model(tuned.weights, tuned.dtype, tuned.bits)
    if tuned.bits != 16:
        model = model.dequantize()
    model = with_adapter(model, adapter, merge=True)
    tokenizer = load_tokenizer(tuned.base)
    with new_directory(output) as made, writing(output):
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return output


def write_exported(tuned: Tuned, output: Path, dtype: torch.dtype = torch.float32, to: str = "lora") -> Path:
    """Write the adapter as plain LoRA: a directory, or `to` "gguf" a file for llama.cpp. The base model's weights are
    read for LoRA-XS alone.

    Raises:
        ValueError: there is no adapter, it is one of PEFT's other methods, or it does not fit the model; or as in
            `vblora.files.lora.export` or `vblora.files.gguf_lora.export`.
    """
    adapter = tuned.adapter
    if adapter is None:
        raise ValueError(
            f"{tuned.base} is no run with an adapter: name a base model here, and the adapter with --adapter"
        )
    if adapter.is_dir() and read_json(adapter / CONFIG_FILE).get("peft_type") == "LORA":
        raise ValueError(f"{adapter} is PEFT's LORA already: use it as it is")
    content = read_adapter(adapter, tuned.base)
    content, factors = replace(content, base_model=tuned.base), None
    if isinstance(content.config, LoRAXSConfig):
        model = load_model(tuned.weights, tuned.dtype, tuned.bits)
        factors = load_adapter(model, adapter).layer_factors()
    if to == "gguf":
        from transformers import AutoConfig

        gguf_lora.export(content, output, AutoConfig.from_pretrained(tuned.base).to_dict(), factors, dtype=dtype)
    else:
        export(content, output, factors, dtype=dtype, task_type=None if content.heads else "CAUSAL_LM")
    return output


# --- An adapter's layers, from the model's configuration alone ----------------------------------------------------


def read_adapter(source: Path, model: str) -> Content:
    """The adapter in a directory or a packed file; which layers of this model it is for, the configuration says.

    Raises:
        ValueError: as in `vblora.files.convert.read_directory`, or `empty_model`.
    """
    if source.is_file():
        return packed.read(source)
    return convert.read_directory(source, empty_model(model, *convert.settings_and_heads(source)))


def empty_model(name: str, config: AdapterConfig, heads: set[str]) -> nn.Module:
    """A base model without weights, from its configuration: the first of its classes that has the adapter's layers
    and heads.

    Raises:
        ValueError: transformers is missing, there is no such model, or none of its classes has them.
    """
    reasons = []
    for model in _classes_of(name):
        try:
            find_targets(model, config)
            saved = find_saved(model, config)
        except ValueError as error:
            reasons.append(f"{type(model).__name__}: {error}")
            continue
        if heads == {f"{module}.{key}" for module in saved for key in saved[module].state_dict()}:
            return model
        reasons.append(f"{type(model).__name__} has other heads")
    raise ValueError(f"{name} does not fit the adapter: {'; '.join(reasons)}")


def _classes_of(name: str) -> Iterator[nn.Module]:
    """The model as the class that its configuration names, then with the usual heads; all on the meta device."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"--model needs transformers: pip install transformers ({error})") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is no model's folder or name: {error}") from error
    named = [getattr(transformers, n) for n in config.architectures or [] if hasattr(transformers, n)]
    makers = [c._from_config for c in named] + [
        auto.from_config
        for auto in (
            transformers.AutoModelForSequenceClassification,
            transformers.AutoModelForCausalLM,
            transformers.AutoModel,
        )
    ]
    for make in makers:
        try:
            with torch.device("meta"):
                model = make(config)
        except ValueError:  # there is no such class of this kind of model
            continue
        yield model
