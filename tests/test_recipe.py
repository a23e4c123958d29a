"""The recipe's numbers, and the start it takes: B of the bank's second part, which is zero."""

from __future__ import annotations

import math

import numpy
import peft
import pytest
import torch
from core_helpers import build, make_batch, run

import vblora
from vblora import counts
from vblora.files.directory import read_config
from vblora.logits import draw
from vblora.shapes import LayerShape, count_vblora, shares
from vblora.switch import RECIPE, own_config
from vblora.targets import find_targets, layer_shapes
from vblora_experiments.arguments import MethodArguments, given

TARGETS = ["up", "down"]  # of the stack: 32 -> 64 and 64 -> 32
DIVIDED = {"r": 2, "num_vectors": 12, "vector_length": 8, "target_modules": TARGETS, "init_vectors_of_a": 5}


def attached(seed=3, **changes):
    model = build("stack")
    return model, vblora.attach(model, vblora.VBLoRAConfig(**{**DIVIDED, **changes}), seed=seed)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_a_divided_start_selects_each_sides_own_vectors_and_changes_nothing(topk):
    before = run(build("stack"), make_batch("stack"))
    model, adapter = attached(topk=topk)
    of_a = adapter.layout.parts % 2 == 0
    assert of_a.tolist() == ([True] * 8 + [False] * 16 + [True] * 16 + [False] * 8) * 2  # r 2, tiles 4 and 8
    assert (adapter.topk_indices[of_a] < 5).all() and (adapter.topk_indices[~of_a] >= 5).all()
    assert adapter.vector_bank[:5].abs().min() > 0 and not adapter.vector_bank[5:].any()
    assert torch.equal(run(model, make_batch("stack")), before)


def test_b_learns_first_as_in_lora():
    model, adapter = attached()
    run(model, make_batch("stack")).square().sum().backward()
    gradient = adapter.vector_bank.grad
    assert not gradient[:5].any() and gradient[5:].abs().sum() > 0


def test_a_row_comes_to_no_vector_of_the_other_side_before_all_of_its_own():
    _, adapter = attached()
    logits, of_a = adapter.dense_logits(), adapter.layout.parts % 2 == 0
    assert (logits[of_a, :5] > 0).all() and (logits[of_a, 5:] < 0).all()
    assert (logits[~of_a, :5] < 0).all() and (logits[~of_a, 5:] > 0).all()


def test_an_undivided_start_is_what_it_was():
    config = vblora.VBLoRAConfig(num_vectors=6, vector_length=4, target_modules=TARGETS)
    bank, blocks = draw(config, (torch.arange(10) >= 5).long(), 7)
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(bank, torch.empty(6, 4).uniform_(-0.02, 0.02, generator=generator))
    assert torch.equal(torch.cat(list(blocks)), torch.randn(10, 6, generator=generator) * 0.1)
    assert not {"init_vectors_of_a", "init_by_kind"} & config.to_dict().keys()


@pytest.mark.parametrize("of_a", [0, 5])
@pytest.mark.parametrize("topk", [1, 2])
def test_by_kind_each_kind_of_layer_starts_on_its_share_of_the_vectors(of_a, topk):
    """Tiles of "up" 4 and 8, of "down" 8 and 4: of 5 vectors of A 2 and 3, of 7 of B 5 and 2; of all 12 6 and 6."""
    _, adapter = attached(init_vectors_of_a=of_a, init_by_kind=True, topk=topk)
    ends = {0: [(0, 6), (0, 6), (6, 12), (6, 12)], 5: [(0, 2), (5, 10), (2, 5), (10, 12)]}[of_a]
    logits, factors = adapter.dense_logits(), adapter.layout.sizes
    for part, (first, last) in zip(logits.split(factors), 2 * ends, strict=True):  # two blocks
        own = torch.zeros(12, dtype=torch.bool)
        own[first:last] = True
        assert (part[:, own] > 0).all() and (part[:, ~own] < 0).all()


def test_too_few_vectors_for_the_kinds_of_layers_are_refused():
    with pytest.raises(ValueError, match="init_by_kind deals 2 vectors out to 2 kinds of layers, and one would have 1"):
        attached(init_vectors_of_a=2, init_by_kind=True, topk=2)
    with pytest.raises(ValueError, match="init_by_kind must be True or False, not 1"):
        vblora.VBLoRAConfig(target_modules=TARGETS, init_by_kind=1)


@pytest.mark.parametrize(
    ("total", "weights"), [(5, [4, 8]), (7, [8, 4]), (10, [1, 1, 1]), (3, [1, 5, 1, 5]), (0, [1, 2])]
)
def test_shares_add_up_and_are_within_one_of_the_proportion(total, weights):
    dealt = shares(total, weights)
    assert sum(dealt) == total
    assert all(abs(one - total * weight / sum(weights)) <= 1 for one, weight in zip(dealt, weights, strict=True))


@pytest.mark.parametrize("wrong", [-1, 1, 11, 12, 2.0, True])
def test_a_division_that_leaves_a_side_without_a_selection_is_refused(wrong):
    with pytest.raises(ValueError, match="init_vectors_of_a"):
        vblora.VBLoRAConfig(**{**DIVIDED, "topk": 2, "init_vectors_of_a": wrong})


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("place", ["peft", "native", "packed"])
def test_the_start_is_kept_and_unselected_logits_are_drawn_as_then(place, topk, tmp_path):
    _, adapter = attached(topk=topk, init_by_kind=True)
    drawn = adapter.dense_logits()
    path = tmp_path / "adapter"
    if place == "packed":
        path = tmp_path / "adapter.vblora"
        adapter.pack(path)
    else:
        adapter.save(path, format=place)
        config = read_config(path)[0]
        assert config.init_vectors_of_a == 5 and config.init_by_kind
    again = vblora.load(build("stack"), path, trainable=True)
    assert again.config == adapter.config
    assert torch.equal(again.topk_indices, adapter.topk_indices)
    unselected = torch.ones_like(drawn).scatter(1, adapter.topk_indices, 0).bool()
    assert torch.equal(again.dense_logits()[unselected], drawn[unselected])


@pytest.mark.parametrize("topk", [1, 2])
def test_peft_reads_a_divided_adapter(topk, tmp_path):
    model, adapter = attached(topk=topk, init_by_kind=True)
    with torch.no_grad():
        adapter.vector_bank.add_(0.3)
    expected = run(model, make_batch("stack"))
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("stack"), tmp_path)
    assert torch.allclose(run(theirs, make_batch("stack")), expected, atol=1e-5)


@pytest.mark.parametrize(("key", "text"), [("init_vectors_of_a", "five"), ("init_by_kind", "2")])
def test_a_damaged_start_is_named(key, text, tmp_path):
    from vblora.io import read_tensors, write_tensors

    _, adapter = attached()
    adapter.save(tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter_model.safetensors")
    write_tensors(tmp_path / "adapter_model.safetensors", tensors, {key: text})
    with pytest.raises(ValueError, match=f"{key} in the metadata must be a whole number, not '{text}'"):
        vblora.load(build("stack"), tmp_path)


def shapes_of(model):
    config = vblora.VBLoRAConfig(target_modules=TARGETS)
    return layer_shapes(find_targets(model, config), config)


def test_the_start_and_the_rates_come_from_the_widths():
    """Sub-vectors of 16: A has two of each 32 wide layer and four of each 64 wide one, for each of r rows."""
    chosen = vblora.recipe(build("stack"), TARGETS, num_vectors=40)
    assert chosen.config.vector_length == 16 and chosen.config.topk == 1 and chosen.config.init_vectors_of_a == 10
    assert chosen.config.init_vector_bank_bound == pytest.approx(3 * math.sqrt((1 / 32 + 2 / 64) / 3))
    assert chosen.rates == {"lr_vector_bank": pytest.approx(2 * 2e-3 * math.sqrt(384 / 32)), "lr_logits": 0.0}
    assert vblora.recipe(build("stack"), TARGETS, lora_rate=1e-3).rates["lr_vector_bank"] == 2e-3


@pytest.mark.parametrize(("width", "rate"), [(96, 4e-3), (384, 2e-3), (768, 1e-3), (4096, 1.875e-4)])
def test_loras_rate_falls_with_the_width_and_rises_as_its_root(width, rate):
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(width, width))
    assert vblora.recipe(model, ["0"]).rates["lr_vector_bank"] == pytest.approx(2 * rate)


@pytest.mark.parametrize("steps", [1, 2, 10, 189])
def test_the_schedule_is_transformers_linear_one(steps):
    """Which is what the scripts train with."""
    from transformers import TrainingArguments
    from transformers.optimization import get_linear_schedule_with_warmup

    chosen = vblora.recipe(build("stack"), TARGETS, num_vectors=40)
    rising = TrainingArguments(warmup_steps=chosen.warmup, report_to=[]).get_warmup_steps(steps)
    rates = []
    for make in (chosen.schedule, lambda optimizer, steps: get_linear_schedule_with_warmup(optimizer, rising, steps)):
        optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "lr": rate} for rate in (4e-3, 1e-3, 0.0)])
        schedule = make(optimizer, steps)
        rates.append([])
        for _ in range(steps + 1):
            rates[-1].append(schedule.get_last_lr())
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(*map(torch.tensor, rates))
    assert rates[0][0] == rates[0][-1] == [0, 0, 0] and (steps == 1 or rates[0][rising] == [4e-3, 1e-3, 0])
    for wrong in (0, 2.5, True, "10", None):
        with pytest.raises(ValueError, match=f"steps must be a whole number from 1 up, not {wrong!r}"):
            chosen.schedule(optimizer, wrong)


def test_mixtures_start_larger_and_have_a_rate_for_their_logits():
    one, two = (vblora.recipe(build("stack"), TARGETS, num_vectors=40, topk=k) for k in (1, 2))
    assert two.rates["lr_logits"] == 3e-2
    assert 1 < two.config.init_vector_bank_bound / one.config.init_vector_bank_bound < math.sqrt(2)


@pytest.mark.parametrize("budget", [3000, 4500, 6000])
def test_the_bank_is_the_largest_that_fits(budget):
    model = build("stack")
    chosen = vblora.recipe(model, TARGETS, max_bytes=budget, vector_length=8)
    sizes = {"r": 4, "vector_length": 8, "topk": 1}
    h = chosen.config.num_vectors
    assert chosen.stored.bytes == count_vblora(shapes_of(model), num_vectors=h, **sizes).bytes <= budget
    assert count_vblora(shapes_of(model), num_vectors=h + 1, **sizes).bytes > budget


@pytest.mark.parametrize("topk", [1, 2])
def test_no_bank_has_more_vectors_than_are_selected(topk):
    model = build("stack")
    chosen = vblora.recipe(model, TARGETS, max_bytes=10**9, vector_length=8, topk=topk)
    assert chosen.config.num_vectors == topk * 4 * (4 + 8) * 4  # r 4, four layers of 32 and 64
    assert reasons(chosen)["num_vectors"].startswith("as many as the sub-vectors select; about ")


def test_without_a_budget_it_is_a_fifth_of_loras_numbers():
    chosen = vblora.recipe(build("stack", hidden=64, layers=6), TARGETS)
    lora = 4 * 2 * (64 + 128) * 6
    assert lora / 5 * 0.9 < chosen.stored.parameters <= lora / 5


def test_every_number_is_printed_with_a_reason():
    chosen = vblora.recipe(build("stack"), TARGETS, num_vectors=40, init_logits_std=2.0)
    lines = str(chosen).splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [choice.name for choice in chosen.choices]
    assert all(choice.reason for choice in chosen.choices) and chosen.config.init_logits_std == 2.0
    assert {choice.name: choice.reason for choice in chosen.choices}["init_logits_std"] == "as given"


def test_its_groups_train_the_adapter():
    model = build("bert")
    chosen = vblora.recipe(model, ["query", "value"], modules_to_save=["classifier"], num_vectors=16)
    adapter = vblora.attach(model, chosen.config)
    groups = chosen.param_groups(model, lr=1e-3, weight_decay=0.1)
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["vector_bank"] == chosen.rates["lr_vector_bank"] and rates["weights"] == 1e-3
    optimizer, before = vblora.AdamW(groups), adapter.vector_bank.detach().clone()
    for _ in range(2):
        run(model, make_batch("bert")).square().mean().backward()
        optimizer.step()
    assert (adapter.vector_bank[adapter.config.init_vectors_of_a :] != 0).any()
    assert (adapter.vector_bank != before).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_bytes": 9000, "num_vectors": 4}, "give one of them"),
        ({"max_bytes": 100}, "100 bytes hold no bank"),
        ({"max_bytes": 1000, "topk": 3}, "1,000 bytes hold no bank of 6 vectors"),
        ({"num_vectors": 1}, "num_vectors 1 "),
        ({"lora_rate": -1.0}, "lora_rate"),
        ({"max_bytes": 2.5}, "max_bytes"),
        ({"lora_rate": True}, "lora_rate must be a number above 0, not True"),
        ({"r": 0}, "r must be"),
        ({"r": 65}, "r 65 is above every width"),
        *[({"topk": wrong}, f"topk must be a whole number from 1 up, not {wrong!r}") for wrong in (0, "2", 1.5, True)],
        ({"speed": 1}, "unknown setting of vblora: speed"),
        ({"init_vector_bank_bound": 0}, "init_vector_bank_bound must be a number above 0"),
        ({"init_logits_std": 0}, "init_logits_std 0 lets all sub-vectors start on the same vectors"),
        ({"num_vectors": 10, "init_vectors_of_a": 10}, "of the 10 vectors"),
    ],
)
def test_what_cannot_be_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        vblora.recipe(build("stack"), TARGETS, **wrong)


@pytest.mark.parametrize("given", [{"num_vectors": 300, "init_vectors_of_a": 270}, {"num_vectors": 10, "topk": 1}])
def test_the_start_is_held_to_the_bank_that_is_chosen(given):
    """Not to the defaults of `VBLoRAConfig`, 256 vectors of which two are selected."""
    chosen = vblora.recipe(build("stack"), TARGETS, **{"init_vectors_of_a": 1, **given})
    assert chosen.config.init_vectors_of_a == given.get("init_vectors_of_a", 1)


@pytest.mark.parametrize(
    ("widths", "length"),
    [
        *[((256, 256), 128), ((768, 3072), 256), ((384, 384), 128), ((576, 192), 64), ((16, 16), 8)],
        *[((60, 60), 30), ((100, 37), 50), ((1000, 1030), 128), ((8, 8), 4), ((1, 1), 1)],
    ],
)
def test_a_row_of_a_has_two_sub_vectors_at_least(widths, length):
    """With one, rows that draw the same vector are the same, and the update has a lower rank than r."""
    chosen = vblora.recipe(torch.nn.Sequential(torch.nn.Linear(*widths)), ["0"], r=1, num_vectors=4)
    assert chosen.config.vector_length == length


@pytest.mark.parametrize(
    ("given", "of_a"),
    [
        ({"num_vectors": 2}, 1),
        ({"num_vectors": 5}, 2),
        ({"num_vectors": 8}, 4),
        ({"num_vectors": 6, "topk": 3}, 3),
        ({"num_vectors": 12, "r": 2}, 3),
        ({"num_vectors": 24, "r": 16}, 6),
        ({"num_vectors": 40}, 10),
    ],
)
def test_a_small_bank_has_up_to_four_vectors_for_a(given, of_a):
    """As many as A has rows, half of the bank at most. With one vector, a quarter of five, all A have rank 1."""
    assert vblora.recipe(build("stack"), TARGETS, **given).config.init_vectors_of_a == of_a


@pytest.mark.parametrize("std", [0.01, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("topk", [1, 2, 3])
@pytest.mark.parametrize("of_a", [0, 30])
def test_a_starts_three_times_as_large_as_loras(of_a, topk, std):
    """LoRA's rows are uniform with variance 1 / (3 in): Kaiming's, of which a is sqrt(5)."""
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    chosen = vblora.recipe(model, ["0"], r=128, topk=topk, num_vectors=200, init_logits_std=std, init_vectors_of_a=of_a)
    adapter = vblora.attach(model, chosen.config, seed=0)
    a, _ = adapter.content().factors()["0"]
    assert float(a.std()) == pytest.approx(3 * math.sqrt(1 / (3 * 256)), rel=0.1)


def test_a_run_that_trains_otherwise_says_so():
    chosen = vblora.recipe(build("stack"), TARGETS, num_vectors=40, topk=2)
    same = chosen.trained_with(chosen.rates, chosen.warmup, chosen.max_grad_norm)
    assert same == chosen
    other = chosen.trained_with({"lr_vector_bank": 1e-3, "lr_logits": None}, 20, 0.3, "cosine")
    shown = {choice.name: (choice.value, choice.reason) for choice in other.choices}
    assert shown["rate of the bank"] == (1e-3, "as given") and "rate of the logits" not in shown
    assert shown["warm-up"] == (20, "steps, then cosine, as given")
    assert shown["gradient clipped to"] == (0.3, "as given")
    assert other.to_dict()["rates"] == {"lr_vector_bank": 1e-3} and other.to_dict()["warmup"] == 20
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = other.schedule(optimizer, 100)
    assert schedule.lr_lambdas[0](10) == 0.5 and schedule.lr_lambdas[0](20) == 1


def test_the_flag_leaves_the_rates_to_the_recipe_and_older_plans_as_they_were():
    on = MethodArguments(recipe=True, rank=2, recipe_bytes=5000)
    assert on.settings(TARGETS, None)["recipe"] == {"max_bytes": 5000}
    assert on.rates() == {"lr_vector_bank": None, "lr_logits": None, "lr_adapter": None}
    assert given(on)["recipe"] is True and "recipe" not in given(MethodArguments())
    with pytest.raises(ValueError, match="--recipe does nothing with --method lora"):
        MethodArguments(method="lora", recipe=True).settings(TARGETS, None)
    with pytest.raises(ValueError, match="without --recipe"):
        MethodArguments(recipe_bytes=5000).settings(TARGETS, None)
    with pytest.raises(ValueError, match="--recipe_bytes and --num_vectors decide the same"):
        MethodArguments(recipe=True, recipe_bytes=5000, num_vectors=30).settings(TARGETS, None)
    with pytest.raises(ValueError, match="--recipe_lora_rate and --learning_rate_vector_bank decide the same"):
        MethodArguments(recipe=True, recipe_lora_rate=1e-3, learning_rate_vector_bank=1e-3).settings(TARGETS, None)


def test_scripts_take_it_for_layers_that_are_several_in_one():
    settings = {"target_modules": ["c_attn"], "split_modules": {"c_attn": ["q", "k", "v"]}, "modules_to_save": None}
    config, chosen = own_config(build("gpt2"), "vblora", {**settings, "num_vectors": 30, RECIPE: {"lora_rate": 1e-3}})
    assert chosen.config is config and config.split_modules == settings["split_modules"]
    assert (config.num_vectors, chosen.rates["lr_vector_bank"]) == (30, 2e-3)
    assert own_config(build("gpt2"), "vblora", settings)[1] is None
    with pytest.raises(ValueError, match="for VB-LoRA alone, not for tied_lora"):
        own_config(build("gpt2"), "tied_lora", {**settings, RECIPE: {}})
    with pytest.raises(ValueError, match="unknown setting of vblora: speed"):
        own_config(build("gpt2"), "vblora", {**settings, RECIPE: {}, "speed": 1})


def linear(*widths):
    """A stack of linear layers of these inputs and outputs, without memory for their weights."""
    with torch.device("meta"):
        return torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in widths))


def reasons(chosen):
    return {choice.name: choice.reason for choice in chosen.choices}


def test_a_few_narrow_layers_do_not_shorten_the_vectors_of_all():
    """As a projection of one number does, or a head of seventeen actions."""
    usual = [(128, 512), (512, 128)] * 3
    plain = vblora.recipe(linear(*usual), "all-linear").config
    with_narrow = vblora.recipe(linear((1, 128), (4, 128), *usual, (128, 17)), "all-linear")
    assert plain.vector_length == with_narrow.config.vector_length == 64
    assert "divides all but the narrowest widths" in reasons(with_narrow)["vector_length"]
    # One number in a thousand of A's is the narrow layers': they move the start as little.
    ratio = with_narrow.config.init_vector_bank_bound / plain.init_vector_bank_bound
    assert 1 < ratio < 1.25
    assert vblora.recipe(linear((4, 8), (8, 4)), "all-linear").config.vector_length == 2


@pytest.mark.parametrize(
    ("widths", "length"),
    [
        ([(4, 128), (128, 4)], 2),  # half of all: they count
        ([(30000, 256), (256, 256), (256, 10)], 128),  # one is wide, and the others are what there is
        ([(30522, 128), *[(128, 128)] * 4], 64),
        ([(64, 4096), *[(4096, 4096)] * 8], 64),
        ([(768, 3072), (3072, 768), *[(768, 768)] * 4], 256),
    ],
)
def test_what_is_narrow_is_seen_by_how_many_are(widths, length):
    assert vblora.recipe(linear(*widths), "all-linear").config.vector_length == length


def test_vectors_that_nothing_selects_are_counted_in_the_reason():
    layers = [(128, 128)] * 8  # 2 * 4 * 2 sub-vectors of 64 in each: 128
    whole = vblora.recipe(linear(*layers), "all-linear", max_bytes=10**9)
    assert whole.config.num_vectors == 128
    expected = 32 * (1 - 1 / 32) ** 64 + 96 * (1 - 1 / 96) ** 64
    assert reasons(whole)["num_vectors"].endswith(f"; about {expected:.0f} of them are drawn for no sub-vector")
    adapter = vblora.attach(torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in layers)), whole.config)
    assert 128 - len(adapter.topk_indices.unique()) == pytest.approx(expected, abs=10)
    given = vblora.recipe(linear(*layers), "all-linear", num_vectors=1000)
    assert reasons(given)["num_vectors"].startswith("as given; about 8")
    assert "drawn for no" not in reasons(vblora.recipe(linear(*layers), "all-linear"))["num_vectors"]


def test_reasons_say_where_a_rate_comes_from():
    assert reasons(vblora.recipe(linear((384, 384)), "all-linear"))["rate of the bank"] == (
        "2 times LoRA's 0.002, at a width of 384"
    )
    for width, way in ((768, "0.001, at 768 by 1/width"), (96, "0.004, at 96 by 1/root of the width")):
        said = reasons(vblora.recipe(linear((width, width)), "all-linear"))["rate of the bank"]
        assert said == f"2 times LoRA's {way} from 0.002 at a width of 384"
    given = vblora.recipe(linear((64, 64)), "all-linear", lora_rate=numpy.float64(1e-3))
    assert reasons(given)["rate of the bank"] == "2 times LoRA's 0.001, as given"
    assert type(given.rates["lr_vector_bank"]) is float and given.rates["lr_vector_bank"] == 2e-3
    bound = vblora.recipe(linear((64, 64)), "all-linear", init_vector_bank_bound=numpy.float32(0.5)).config
    assert type(bound.init_vector_bank_bound) is float and bound.init_vector_bank_bound == 0.5


def test_too_few_vectors_for_every_kind_are_named_before_the_model_is_changed():
    names = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in "abcdef"})
    with pytest.raises(ValueError, match="init_by_kind deals 4 vectors out to 6 kinds of layers"):
        vblora.recipe(names, "all-linear", num_vectors=8, init_by_kind=True)


def test_a_bank_is_found_in_few_steps_whatever_the_layers(monkeypatch):
    """Nine seconds for a model of eight thousand million weights, once, when each size was tried in turn."""
    tried, count = [], counts.count_vblora
    monkeypatch.setattr(counts, "count_vblora", lambda *a, **k: tried.append(k["num_vectors"]) or count(*a, **k))
    layers = [(4096, 4096)] * 128 + [(4096, 14336)] * 64 + [(14336, 4096)] * 32
    chosen = vblora.recipe(linear(*layers), "all-linear", vector_length=16, max_bytes=20_000_000)
    h, shapes = chosen.config.num_vectors, [LayerShape("x", *pair) for pair in layers]
    more = count_vblora(shapes, r=4, num_vectors=h + 1, vector_length=16, topk=1)
    assert chosen.stored.bytes <= 20_000_000 < more.bytes and len(tried) < 30
