"""Training: vblora.AdamW on the selected logits against AdamW on all of PEFT's, and the parameter groups."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from core_helpers import METHODS, adapt, build, make_batch, peft_native, peft_tensors, peft_twin, run

import vblora

RATES = {"lr_vector_bank": 1e-3, "lr_logits": 1e-2}


def data(step, dtype, rows=4):
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(rows, 3, 5, generator=generator, dtype=dtype)
    y = torch.randn(rows, 3, 16, generator=generator, dtype=dtype)
    return x, y


class Pair:
    """Our model with vblora.AdamW beside PEFT's twin with torch.optim.AdamW, trained on the same data."""

    def __init__(self, lr=1e-2, dtype=torch.float64, weight_decay=0.0, seed=3, init_logits_std=0.05, **settings):
        self.dtype = dtype
        base, self.model = build("stack", hidden=16), build("stack", hidden=16)
        settings = {"topk": 2, "num_vectors": 40, "init_vector_bank_bound": 0.3, **settings}
        self.adapter = adapt(self.model, seed=seed, init_logits_std=init_logits_std, **settings)
        self.twin = peft_twin(base, self.adapter)
        self.model.to(dtype).train()
        self.twin.to(dtype).train()
        groups = vblora.param_groups(self.model, lr=lr, lr_vector_bank=lr / 10, lr_logits=lr)
        for group in groups:
            group["weight_decay"] = weight_decay
        self.ours = vblora.AdamW(groups)
        tensors = peft_tensors(self.twin)
        bank = [p for n, p in tensors.items() if "bank" in n]
        logits = [p for n, p in tensors.items() if "bank" not in n]
        self.theirs = torch.optim.AdamW(
            [{"params": bank, "lr": lr / 10}, {"params": logits, "lr": lr}], weight_decay=weight_decay
        )
        self.moved = torch.zeros(len(self.adapter.topk_indices), dtype=torch.bool)

    def losses(self, step):
        x, y = data(step, self.dtype)
        return [(model(x) - y).square().mean() for model in (self.model, self.twin)]

    def step(self, step):
        for loss in self.losses(step):
            loss.backward()
        self.update()

    def update(self):
        before = self.adapter.topk_indices.sort(dim=1).values
        self.ours.step()
        self.theirs.step()
        self.ours.zero_grad()
        self.theirs.zero_grad()
        self.moved |= (self.adapter.topk_indices.sort(dim=1).values != before).any(dim=1)

    def assert_same(self, tolerance):
        theirs = peft_native(self.twin, self.adapter)
        assert (self.adapter.dense_logits() - theirs["logits"]).abs().max() <= tolerance
        assert (self.adapter.vector_bank - theirs["vector_bank"]).abs().max() <= tolerance
        selection = theirs["logits"].topk(self.adapter.config.topk).indices
        assert torch.equal(self.adapter.topk_indices.sort(dim=1).values, selection.sort(dim=1).values)


@pytest.mark.parametrize(("lr", "topk"), [(1e-3, 2), (1e-2, 3), (5e-2, 2)])
def test_three_hundred_steps_are_pefts_while_the_selection_changes(lr, topk):
    pair = Pair(lr, topk=topk, init_logits_std=0.01 if lr < 1e-2 else 0.05)
    for step in range(300):
        pair.step(step)
        if step % 50 == 49:
            pair.assert_same(1e-8)
    assert pair.moved.float().mean() > 0.6


def test_float32_training_is_pefts():
    pair = Pair(1e-2, dtype=torch.float32)
    for step in range(40):
        pair.step(step)
    theirs = peft_native(pair.twin, pair.adapter)
    assert (pair.adapter.dense_logits() - theirs["logits"]).abs().max() <= 1e-5
    assert pair.moved.float().mean() > 0.3


def test_topk_one_keeps_its_logits_still():
    pair = Pair(1e-2, topk=1)
    start = pair.adapter.dense_logits()
    for step in range(5):
        pair.step(step)
    pair.assert_same(1e-10)
    assert torch.equal(pair.adapter.dense_logits(), start)


def test_weight_decay_acts_on_all_logits_as_in_peft():
    pair = Pair(1e-2, weight_decay=0.5)
    start = pair.adapter.dense_logits()
    for step in range(50):
        pair.step(step)
    pair.assert_same(1e-8)
    untouched = pair.ours.state[pair.adapter.topk_logits]["exp_avg_sq"] == 0
    assert untouched.any()
    torch.testing.assert_close(pair.adapter.dense_logits()[untouched], start[untouched] * (1 - 1e-2 * 0.5) ** 50)


def test_a_schedule_with_warm_up_gives_pefts_steps():
    pair = Pair(2e-2)

    def factor(step):
        return min(step / 10, max(0.0, (50 - step) / 40))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in (pair.ours, pair.theirs)]
    for step in range(50):
        pair.step(step)
        for schedule in schedules:
            schedule.step()
    pair.assert_same(1e-8)
    assert pair.moved.any()


def test_clipping_by_the_global_norm_gives_pefts_norm_and_steps():
    pair = Pair(1e-2)
    for step in range(50):
        for loss in pair.losses(step):
            (100 * loss).backward()
        norms = [
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
            for model in (pair.model, pair.twin)
        ]
        assert norms[0] > 0.5
        torch.testing.assert_close(norms[0], norms[1])
        pair.update()
    pair.assert_same(1e-8)


def test_gradient_accumulation_gives_pefts_steps():
    pair = Pair(1e-2)
    for step in range(40):
        for part in range(3):
            for loss in pair.losses(3 * step + part):
                (loss / 3).backward()
        pair.update()
    pair.assert_same(1e-8)


def test_a_step_without_gradient_changes_nothing():
    pair = Pair(1e-2)
    pair.step(0)
    before = copy.deepcopy(pair.model.state_dict())
    pair.ours.zero_grad()
    pair.ours.step()
    assert all(torch.equal(before[key], t) for key, t in pair.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grad_scaler_skips_a_step_with_infinite_gradients_and_goes_on(dtype):
    pair = Pair(1e-2, dtype=torch.float32)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4) for _ in range(2)]
    for step in range(20):
        x, y = data(step, torch.float32)
        spoiled = step in (3, 9)
        before = copy.deepcopy(pair.model.state_dict())
        for model, optimizer, scaler in zip((pair.model, pair.twin), (pair.ours, pair.theirs), scalers, strict=True):
            with torch.autocast("cpu", dtype):
                output = model(x)
            loss = (output.float() - y).square().mean()
            scaler.scale(loss * (float("inf") if spoiled else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        unchanged = all(torch.equal(before[key], t) for key, t in pair.model.state_dict().items())
        assert unchanged == spoiled
    theirs = peft_native(pair.twin, pair.adapter)
    # Rounding to 8 or 11 bits happens in other places than in PEFT, so near-zero gradients differ in sign:
    # the steps agree in general, not digit by digit.
    ours = pair.adapter.dense_logits()
    assert torch.isfinite(ours).all()
    assert torch.corrcoef(torch.stack([ours.flatten(), theirs["logits"].flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_training_goes_on_from_saved_states_as_if_never_stopped(weight_decay):
    straight, first = Pair(1e-2, weight_decay=weight_decay), Pair(1e-2, weight_decay=weight_decay)
    for step in range(30):
        straight.step(step)
        first.step(step)
    buffer = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "optimizer": first.ours.state_dict()}, buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    second = Pair(1e-2, weight_decay=weight_decay, seed=77)  # other initial values, all to be replaced
    second.model.load_state_dict(states["model"])
    second.ours.load_state_dict(states["optimizer"])
    for step in range(30, 60):
        straight.step(step)
        second.step(step)
    for key, t in straight.model.state_dict().items():
        assert torch.equal(t, second.model.state_dict()[key]), key
    assert straight.moved.any()


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_dict_into_a_trained_model_warns_of_nothing_and_trains_on(assign):
    pair, other = Pair(1e-2), Pair(1e-2, seed=9)
    state = copy.deepcopy(other.model.state_dict())
    for step in range(3):
        pair.step(step)
    pair.model.load_state_dict(state, assign=assign)
    optimizer = vblora.AdamW(vblora.param_groups(pair.model, lr=1e-2, **RATES))
    reference = vblora.AdamW(vblora.param_groups(other.model, lr=1e-2, **RATES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            x, y = data(step, torch.float64)
            for model, each in ((pair.model, optimizer), (other.model, reference)):
                (model(x) - y).square().mean().backward()
                each.step()
                each.zero_grad()
    for key, t in other.model.state_dict().items():
        assert torch.equal(t, pair.model.state_dict()[key]), key


@pytest.mark.parametrize("fused", [False, True])
def test_another_optimizer_is_warned_about_once_and_reselect_mends(fused):
    pair = Pair(5e-2)
    optimizer = torch.optim.AdamW([p for p in pair.model.parameters() if p.requires_grad], lr=0.2, fused=fused)
    indices = pair.adapter.topk_indices.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(10):
            pair.losses(step)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    texts = [str(w.message) for w in caught if "selection" in str(w.message)]
    assert len(texts) == 1 and "vblora.AdamW" in texts[0]
    assert torch.equal(pair.adapter.topk_indices, indices)
    dense = pair.adapter.dense_logits()
    pair.adapter.reselect()
    assert torch.equal(pair.adapter.topk_indices, dense.topk(2).indices)
    assert not torch.equal(pair.adapter.topk_indices, indices)
    assert torch.equal(pair.adapter.dense_logits(), dense)


def test_our_optimizer_causes_no_warning():
    pair = Pair(5e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            pair.step(step)
            with torch.no_grad():
                pair.losses(step)


def test_step_returns_the_loss_of_a_closure():
    pair = Pair(1e-2)

    def closure():
        pair.ours.zero_grad()
        loss = pair.losses(0)[0]
        loss.backward()
        return loss

    before = pair.adapter.dense_logits()
    torch.testing.assert_close(pair.ours.step(closure), pair.losses(0)[1], rtol=1e-12, atol=0)
    assert not torch.equal(pair.adapter.dense_logits(), before)


def test_step_hooks_run_once_a_step():
    pair = Pair(1e-2)  # has made a torch.optim.AdamW, too
    calls = []
    pair.ours.register_step_pre_hook(lambda *_: calls.append("before"))
    pair.ours.register_step_post_hook(lambda *_: calls.append("after"))
    pair.step(0)
    assert calls == ["before", "after"]


@pytest.mark.filterwarnings("ignore:the logits were stepped by another optimiser")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fused", [False, True])
def test_evaluation_follows_a_step_of_any_optimizer(method, fused):
    """A fused step changes parameters without PyTorch's version counter noticing."""
    model = build("stack").train()
    adapt(model, method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
    batch = make_batch("stack")
    run(model, batch).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        output = run(model, batch)
        fresh = run(copy.deepcopy(model), batch)
    assert torch.equal(output, fresh)


# --- Parameter groups --------------------------------------------------------------------------------------------


def members(groups):
    return {group["name"]: {id(p) for p in group["params"]} for group in groups}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", [None, ["classifier"]])
def test_every_trainable_parameter_is_in_exactly_one_group(method, head):
    model = build("bert")
    adapter = adapt(model, method, "bert", modules_to_save=head, target_modules=["query", "value"])
    rates = RATES if method == "vblora" else {"lr_adapter": 3e-3}
    groups = vblora.param_groups(model, lr=4e-3, weight_decay=0.1, **rates)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    found = members(groups)
    own = {id(p) for p in adapter.parameters()}
    if method == "vblora":
        assert found["vector_bank"] == {id(adapter.vector_bank)} and found["logits"] == {id(adapter.topk_logits)}
    else:
        scales = {id(p) for name, p in adapter.named_parameters() if name.startswith("scale")}
        assert found["adapter"] == own - scales and found.get("scales", set()) == scales
        assert bool(scales) == (method == "tied_lora")
    assert ("weights" in found) == ("biases" in found) == bool(head)
    if head:
        assert found["weights"] == {id(model.classifier.weight)} and found["biases"] == {id(model.classifier.bias)}
    by_name = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    expected = {
        "vector_bank": (1e-3, 0.0),
        "logits": (1e-2, 0.0),
        "adapter": (3e-3, 0.1),
        "scales": (3e-3, 0.0),
        "weights": (4e-3, 0.1),
        "biases": (4e-3, 0.0),
    }
    assert by_name == {name: expected[name] for name in by_name}


def test_the_rate_of_other_methods_is_lr_unless_given():
    model = build("stack")
    adapt(model, "tied_lora")
    assert [group["lr"] for group in vblora.param_groups(model, lr=7e-3)] == [7e-3, 7e-3]


@pytest.mark.parametrize(("given", "named"), [("lr_logits", "lr_vector_bank"), ("lr_vector_bank", "lr_logits")])
def test_a_missing_rate_is_named(given, named):
    model = build("stack")
    adapt(model)
    with pytest.raises(ValueError, match=f"{named} is missing"):
        vblora.param_groups(model, lr=1e-3, **{given: 1e-2})


@pytest.mark.parametrize(
    ("method", "rate"),
    [("tied_lora", "lr_vector_bank"), ("lora_xs", "lr_logits"), ("vblora", "lr_adapter"), (None, "lr_logits")],
)
def test_a_rate_for_nothing_is_named(method, rate):
    model = build("stack")
    rates = {}
    if method:
        adapt(model, method)
    if method == "vblora":
        rates = dict(RATES)
    with pytest.raises(ValueError, match=f"{rate} is given"):
        vblora.param_groups(model, lr=1e-3, **{**rates, rate: 1e-2})


def test_a_frozen_model_has_no_groups():
    model = build("stack").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        vblora.param_groups(model, lr=1e-3)


def test_frozen_logits_are_in_no_group():
    model = build("stack")
    adapter = adapt(model)
    adapter.topk_logits.requires_grad_(False)
    groups = vblora.param_groups(model, lr=1e-3, lr_vector_bank=1e-3)
    assert members(groups) == {"vector_bank": {id(adapter.vector_bank)}}


def test_groups_work_through_a_wrapper_and_a_copy_of_the_model():
    model = build("stack")
    adapt(model)
    wrapped = torch.nn.ModuleDict({"module": copy.deepcopy(model)})
    inner = wrapped["module"]
    groups = vblora.param_groups(wrapped, lr=1e-3, **RATES)
    assert members(groups)["logits"] == {id(inner.vblora_adapter.topk_logits)}
    before = inner.vblora_adapter.dense_logits()
    run(inner, make_batch("stack")).square().mean().backward()
    vblora.AdamW(groups).step()
    assert not torch.equal(inner.vblora_adapter.dense_logits(), before)
    assert torch.equal(model.vblora_adapter.dense_logits(), before)


def test_plain_parameters_are_trained_as_by_torch():
    models = [build("stack"), build("stack")]
    optimizers = [
        vblora.AdamW(vblora.param_groups(models[0], lr=1e-2, weight_decay=0.1)),
        torch.optim.AdamW(vblora.param_groups(models[1], lr=1e-2, weight_decay=0.1)),
    ]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            run(model, make_batch("stack")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_two_adapters_are_trained_by_one_optimizer():
    model = build("stack").train()
    first = adapt(model, target_modules=["up"], name="first")
    second = adapt(model, target_modules=["down"], name="second", seed=8)
    groups = vblora.param_groups(model, lr=1e-2, **RATES)
    assert members(groups)["logits"] == {id(first.topk_logits), id(second.topk_logits)}
    before = [first.dense_logits(), second.dense_logits()]
    optimizer = vblora.AdamW(groups)
    run(model, make_batch("stack")).square().mean().backward()
    optimizer.step()
    assert not torch.equal(first.dense_logits(), before[0]) and not torch.equal(second.dense_logits(), before[1])


def test_settings_of_a_group_are_used_for_its_logits():
    """Rates and betas per group, as in torch.optim.AdamW."""
    model = build("stack")
    adapter = adapt(model)
    run(model, make_batch("stack")).square().mean().backward()
    before = adapter.dense_logits()
    groups = [{"params": [adapter.topk_logits], "lr": 0.25, "betas": (0.5, 0.5), "eps": 1e-30}]
    gradient = adapter.topk_logits.grad.clone()
    indices = adapter.topk_indices.clone()
    vblora.AdamW(groups).step()
    expected = before.scatter_add(1, indices, -0.25 * gradient.sign())  # the first step of Adam
    torch.testing.assert_close(adapter.dense_logits(), expected)
