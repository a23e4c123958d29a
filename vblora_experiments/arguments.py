"""The flags that choose a method and its settings, the same in every task folder."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from vblora.methods.through_peft import peft_config_class
from vblora.switch import OWN_METHODS, RECIPE, field_names, parse_settings, read_config_file
from vblora_experiments import commands
from vblora_experiments.rows import PAPER_LR_LOGITS, PAPER_LR_VECTOR_BANK

# Which field of a method's configuration a flag sets: the first of these that the configuration has.
FIELDS_OF_FLAG: dict[str, tuple[str, ...]] = {
    "rank": ("r",),
    "topk": ("topk",),
    "rule": ("rule",),
    "tau": ("tau",),
    "num_vectors": ("num_vectors",),
    "vector_length": ("vector_length",),
    "init_logits_std": ("init_logits_std",),
    "init_vector_bank_bound": ("init_vector_bank_bound",),
    "init_vectors_of_a": ("init_vectors_of_a",),
    "init_by_kind": ("init_by_kind",),
    "lora_alpha": ("lora_alpha",),
    "adapter_dropout": ("vblora_dropout", "lora_dropout", "vera_dropout"),
}


# What a recipe decides where no flag does; a row's own values stand for another choice of all of them.
OF_RECIPE = (
    *("rank", "topk", "num_vectors", "vector_length"),
    *("init_logits_std", "init_vector_bank_bound", "init_vectors_of_a", "init_by_kind"),
    *("learning_rate_vector_bank", "learning_rate_logits"),
)


@dataclass
class BatchArguments:
    """How many texts are decoded at a time, which decides nothing."""

    decode_batch_size: int = field(default=16, metadata={"help": "inputs decoded at a time"})

    def __post_init__(self) -> None:
        commands.check_least(self, decode_batch_size=1)


WITHOUT_SETTINGS = ("full", "zero_shot")  # all of the model is trained, or nothing


def _flag(help_text: str) -> Any:
    return field(default=None, metadata={"help": help_text})


@dataclass
class MethodArguments:
    """Which method, with which settings. A flag that the method has no use for is refused."""

    method: str = field(
        default="vblora",
        metadata={
            "help": "full, vblora, vblora_selection (other rules than top-k), tied_lora, lora_xs, a method of PEFT "
            "(lora, vera, dora, olora, ...), or the path of a PEFT configuration as JSON"
        },
    )
    method_settings: str | None = _flag("further settings of the method as JSON, such as '{\"use_rslora\": true}'")
    rank: int | None = _flag("rank r")
    topk: int | None = _flag("k, the vectors mixed into a sub-vector")
    rule: str | None = _flag("vblora_selection's rule: noisy_topk, gumbel or gumbel_st")
    tau: float | None = _flag("temperature of the Gumbel rules")
    num_vectors: int | None = _flag("h, the vectors in the bank")
    vector_length: int | None = _flag("b, the length of a sub-vector")
    init_logits_std: float | None = _flag("standard deviation of the initial logits")
    init_vector_bank_bound: float | None = _flag("bound of the initial bank")
    init_vectors_of_a: int | None = _flag("the first so many vectors start as A's, the others at zero as B's")
    init_by_kind: bool | None = _flag("True: every kind of layer (query, key, ...) starts on vectors of its own")
    lora_alpha: float | None = _flag("scaling: alpha / r, where the method has one")
    adapter_dropout: float | None = _flag("dropout on the factors' input")
    recipe: bool = field(
        default=False,
        metadata={
            "help": "VB-LoRA's settings and rates from the layers' widths (docs/recipe.md), where no flag gives them; "
            "those of a row do not count"
        },
    )
    recipe_bytes: int | None = _flag(
        "with --recipe: bytes of the adapter's tensors, without header and head; a fifth of LoRA's numbers unless given"
    )
    recipe_lora_rate: float | None = _flag("with --recipe: the rate at which LoRA would be trained")
    learning_rate_vector_bank: float | None = _flag(f"of the bank; {PAPER_LR_VECTOR_BANK} unless given")
    learning_rate_logits: float | None = _flag(f"of the logits; {PAPER_LR_LOGITS} unless given")
    learning_rate_adapter: float | None = _flag("of other methods' parameters; --learning_rate unless given")

    def settings(self, target_modules: list[str] | str, modules_to_save: list[str] | None) -> dict[str, Any]:
        """The method's settings as `vblora.switch.apply_method` takes them.

        Raises:
            ValueError: a flag the method has no use for, or a size below 1.
        """
        commands.check_least(self, rank=1, topk=1, num_vectors=1, vector_length=1, recipe_bytes=1)
        if self.recipe_lora_rate is not None and not 0 < self.recipe_lora_rate < math.inf:
            raise ValueError(f"--recipe_lora_rate must be a number above 0, not {self.recipe_lora_rate}")
        known = set() if self.method in WITHOUT_SETTINGS else field_names(self.method)
        chosen: dict[str, Any] = {"target_modules": target_modules, "modules_to_save": modules_to_save}
        if self.method.endswith(".json"):  # what the file says goes before what the task would choose
            in_file = read_config_file(self.method)
            chosen = {key: value for key, value in chosen.items() if key not in in_file}
        for flag, names in FIELDS_OF_FLAG.items():
            value = getattr(self, flag)
            if value is None:
                continue
            name = next((name for name in names if name in known), None)
            if name is None:
                raise ValueError(f"--{flag} does nothing with --method {self.method}: leave it out")
            chosen[name] = value
        if self.method_settings is not None:
            chosen |= parse_settings(self.method_settings)
        more = {"max_bytes": self.recipe_bytes, "lora_rate": self.recipe_lora_rate}
        more = {name: value for name, value in more.items() if value is not None}
        if self.recipe:
            if self.method != "vblora":
                raise ValueError(f"--recipe does nothing with --method {self.method}: leave it out")
            self._require_one_of("recipe_bytes", "num_vectors")
            self._require_one_of("recipe_lora_rate", "learning_rate_vector_bank")
            chosen[RECIPE] = more
        elif more:
            raise ValueError("--recipe_bytes and --recipe_lora_rate do nothing without --recipe")
        return chosen

    def _require_one_of(self, first: str, second: str) -> None:
        """Refuse two flags of which one would do nothing."""
        if getattr(self, first) is not None and getattr(self, second) is not None:
            raise ValueError(f"--{first} and --{second} decide the same: give one of them")

    def rates(self) -> dict[str, float | None]:
        """The learning rates as `vblora.param_groups` takes them, beside the head's.

        With --recipe those that no flag gives are None: `AdapterTrainer` takes them from the recipe.
        """
        bank, logits = self.learning_rate_vector_bank, self.learning_rate_logits
        if self.method in ("vblora", "vblora_selection") and not self.recipe:
            bank = PAPER_LR_VECTOR_BANK if bank is None else bank
            logits = PAPER_LR_LOGITS if logits is None else logits
        return {"lr_vector_bank": bank, "lr_logits": logits, "lr_adapter": self.learning_rate_adapter}

    def unset(self) -> dict[str, tuple[Any, str]]:
        """What counts where no flag is given, and where it comes from: by the flag's name."""
        found: dict[str, tuple[Any, str]] = {}
        for name, rate in self.rates().items():
            if rate is not None:
                found[f"learning_rate_{name.removeprefix('lr_')}"] = (rate, "default, the paper's")
        if self.recipe or self.method in WITHOUT_SETTINGS or self.method.endswith(".json"):
            return found
        settings = parse_settings(self.method_settings) if self.method_settings is not None else {}
        kind: Any = OWN_METHODS.get(self.method) or peft_config_class(self.method)
        defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
        for flag, names in FIELDS_OF_FLAG.items():
            field_name = next((name for name in names if name in defaults), None)
            if field_name in settings:
                found[flag] = (settings[str(field_name)], "method_settings")
            elif field_name is not None:
                found[flag] = (defaults[field_name], f"default of {self.method}")
        return found


def given(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass that are set to something; `recipe` only if it is on, as older records lack it."""
    values = {f.name: getattr(arguments, f.name) for f in fields(arguments)}
    return {name: value for name, value in values.items() if value is not None and (name != "recipe" or value)}


def split(arguments: list[str]) -> list[str]:
    """The arguments with "--flag=value" in two."""
    return [part for a in arguments for part in (a.split("=", 1) if a.startswith("--") else [a])]
