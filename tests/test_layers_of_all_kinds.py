"""The adapter on layers that others have changed: checkpointed, offloaded, quantised."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from core_helpers import METHODS, QUERY_VALUE, adapt, build, config_for, gradients, groups_for, make_batch, run, stir
from torch import nn

import vblora
from vblora.base_weights import full_weight

every_method = pytest.mark.parametrize("method", METHODS)
both_forms = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])


# --- Gradient checkpointing --------------------------------------------------------------------------------------


def checkpointed(kind, use_reentrant):
    model = build(kind, layers=3).train()
    if kind.startswith("stack"):
        model.use_reentrant = use_reentrant
    elif use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


@pytest.mark.filterwarnings("ignore:`use_cache=True` is incompatible")
@both_forms
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "stack", "stack_conv1d"])
@every_method
def test_checkpointing_changes_no_gradient(method, kind, use_reentrant):
    """Two passes in a row, accumulated; then a step; then another pass."""
    results = []
    for form in (None, use_reentrant):
        model = checkpointed(kind, form)
        adapter = adapt(model, method, kind)
        optimizer = vblora.AdamW(groups_for(model))
        seen = []
        for step in range(3):
            output = run(model, make_batch(kind, seed=step))
            output.square().mean().backward()
            seen.append(gradients(adapter))
            if step == 1:
                optimizer.step()
                optimizer.zero_grad()
        results.append(seen)
    for expected, found in zip(*results, strict=True):
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@both_forms
@every_method
def test_a_pass_without_gradients_before_the_backward_pass_disturbs_nothing(method, use_reentrant):
    results = []
    for form in (None, use_reentrant):
        model = checkpointed("llama", form)
        adapter = adapt(model, method, "llama")
        loss = run(model, make_batch("llama")).square().mean()
        with torch.no_grad():
            run(model, make_batch("llama", seed=1))
        loss.backward()
        results.append(gradients(adapter))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-6)


@both_forms
@every_method
def test_checkpointing_under_autocast_changes_no_gradient(method, use_reentrant):
    results = []
    for form in (None, use_reentrant):
        model = checkpointed("llama", form)
        adapter = adapt(model, method, "llama")
        with torch.autocast("cpu", torch.bfloat16):
            output = run(model, make_batch("llama"))
        output.float().square().mean().backward()
        results.append(gradients(adapter))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=2e-2, atol=1e-2 * float(gradient.abs().max()))


@both_forms
@every_method
def test_checkpointing_with_dropout_draws_the_same_masks_again(method, use_reentrant):
    field = "vblora_dropout" if method == "vblora" else "lora_dropout"
    results = []
    for form in (None, use_reentrant):
        model = checkpointed("stack", form)
        adapter = adapt(model, method, **{field: 0.3})
        torch.manual_seed(11)
        run(model, make_batch("stack")).square().mean().backward()
        results.append(gradients(adapter))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_method
def test_the_whole_model_may_stand_inside_a_checkpoint(method, use_reentrant):
    results = []
    for inside in (False, True):
        model = build("stack").train()
        adapter = adapt(model, method)
        x = make_batch("stack")["x"].requires_grad_()
        for _ in range(2):
            call = functools.partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=use_reentrant)
            output = (call if inside else model)(x)
            output.square().mean().backward()
        results.append(gradients(adapter))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_frozen_embeddings_require_a_gradient_only_while_checkpointed_training_needs_it(kind):
    model = build(kind)
    adapt(model, kind=kind)
    embeddings = model.get_input_embeddings()
    ids = make_batch(kind)["input_ids"]
    model.train()
    assert not embeddings(ids).requires_grad
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True  # not by transformers' own call, which may add a hook of its own
    assert embeddings(ids).requires_grad
    with torch.no_grad():
        assert not embeddings(ids).requires_grad
    model.eval()
    assert not embeddings(ids).requires_grad


# --- Weights that accelerate keeps elsewhere ---------------------------------------------------------------------


def offload(model, how, directory):
    import accelerate

    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk_offload":
        return accelerate.disk_offload(model, str(directory), execution_device=torch.device("cpu"))
    blocks = {"llama": "model.layers", "bert": "bert.encoder.layer"}
    devices = {name: "cpu" for name, module in model.named_modules() if name and not list(module.children())}
    kind = "llama" if hasattr(model, "lm_head") else "bert"
    devices = {
        name: "disk" if name.startswith(blocks[kind] + ".1") else "cpu"
        for name in devices
        if list(model.get_submodule(name).parameters()) or list(model.get_submodule(name).buffers())
    }
    return accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=str(directory), force_hooks=True)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("method", ["vblora", "tied_lora"])
def test_an_offloaded_model_gives_the_same_output_and_gradients(method, kind, how, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    settings = {"target_modules": QUERY_VALUE[kind]}
    plain, model = build(kind), build(kind)
    reference = adapt(plain, method, kind, **settings)
    model = offload(model, how, tmp_path)
    adapter = adapt(model, method, kind, **settings)
    assert any(m.weight.is_meta for m in adapter.targets.values())
    assert {p.device.type for p in adapter.parameters()} == {"cpu"}
    outputs = [run(each, make_batch(kind)) for each in (plain, model)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    expected = gradients(reference)
    for name, gradient in gradients(adapter).items():
        torch.testing.assert_close(gradient, expected[name])
    with torch.no_grad():
        assert torch.equal(run(model, make_batch(kind)), outputs[0])
    name = next(n for n, m in adapter.targets.items() if m.weight.is_meta)
    with pytest.raises(ValueError, match=f"{name} is offloaded"):
        adapter.merge()


def test_singular_factors_of_an_offloaded_weight_are_refused():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.cpu_offload(build("bert"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded"):
        vblora.attach(model, config_for("lora_xs", target_modules=["query"]))
    assert not hasattr(model, "lora_xs_adapter")


# --- Quantised layers --------------------------------------------------------------------------------------------


def quantised(kind, form):
    """A model of `build` whose blocks' linear layers are bitsandbytes' own."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = build(kind, hidden=64)
    blocks = {"llama": "model.layers.", "bert": "bert.encoder."}[kind]
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(blocks):
            bias = module.bias is not None
            if form == "nf4":
                layer = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=bias,
                    quant_type="nf4",
                    compress_statistics=True,
                    compute_dtype=torch.float32,
                )
            else:
                layer = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=bias, has_fp16_weights=False)
            layer.load_state_dict(module.state_dict())
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.to("cpu"))
    return model


every_quantisation = pytest.mark.parametrize("form", ["nf4", "int8"])


@every_quantisation
@pytest.mark.parametrize("kind", ["bert", "llama"])
@every_method
def test_a_quantised_layers_output_has_the_factors_product_added(method, kind, form):
    model = quantised(kind, form)
    run(model, make_batch(kind))  # 8-bit layers take on their final form at the first pass
    bases = {n: copy.deepcopy(model.get_submodule(n)) for n in target_names(model, kind)}
    adapter = adapt(model, method, kind, target_modules=QUERY_VALUE[kind])
    assert list(adapter.targets) == list(bases)
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: seen.__setitem__(name, (args[0], output)))
        for name, module in adapter.targets.items()
    ]
    output = run(model, make_batch(kind))
    for handle in handles:
        handle.remove()
    for name, (a, b) in adapter.layer_factors().items():
        x, y = seen[name]
        with torch.no_grad():
            expected = bases[name](x) + x @ a.T @ b.T
        assert (x @ a.T @ b.T).abs().max() > 1e-2
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    output.square().mean().backward()
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(adapter).values())


def target_names(model, kind):
    return [n for n, _ in model.named_modules() if n.endswith(tuple(f".{t}" for t in QUERY_VALUE[kind]))]


@every_quantisation
@every_method
def test_merging_into_a_quantised_layer_is_refused_by_name(method, form):
    model = quantised("llama", form)
    adapter = adapt(model, method, "llama")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is quantised"):
        adapter.merge()
    assert not adapter.merged


@every_quantisation
@every_method
def test_training_and_detaching_on_quantised_layers(method, form):
    model = quantised("llama", form).train()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = run(model, make_batch("llama"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapter = adapt(model, method, "llama")
    optimizer = vblora.AdamW(groups_for(model))
    losses = []
    for _ in range(4):
        loss = (run(model, make_batch("llama")) - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapter.detach()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(run(model, make_batch("llama")), before)


@every_quantisation
def test_a_quantised_model_saves_and_loads_its_adapter(form, tmp_path):
    model, other = quantised("llama", form), quantised("llama", form)
    adapter = adapt(model, kind="llama")
    adapter.save(tmp_path)
    vblora.load(other, tmp_path)
    assert_close_output(other, model)


def assert_close_output(model, other):
    torch.testing.assert_close(run(model, make_batch("llama")), run(other, make_batch("llama")), rtol=1e-4, atol=1e-5)


@every_quantisation
@pytest.mark.parametrize("after_a_pass", [False, True])
def test_singular_factors_are_those_of_the_quantised_weight(form, after_a_pass):
    model = quantised("llama", form)
    plain = build("llama", hidden=64)
    if after_a_pass:
        run(model, make_batch("llama"))
    for name in target_names(model, "llama"):
        weight, original = full_weight(model.get_submodule(name)), plain.get_submodule(name).weight
        assert weight.shape == original.shape and weight.is_floating_point()
        error = (weight.float() - original).norm() / original.norm()
        assert error < {"nf4": 0.12, "int8": 0.02}[form]
    adapter = stir(vblora.attach(model, config_for("lora_xs", "llama")))
    assert adapter.svd_in.isfinite().all() and adapter.svd_out.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_that_another_hook_keeps_stays_what_it_was(bias):
    """A plain layer's output is added to in place, unless someone else may hold it."""
    model = nn.Sequential(nn.Linear(6, 6, bias=bias), nn.Linear(6, 4, bias=bias))
    x, kept = torch.randn(3, 2, 6), []
    base = model[1](model[0](x))
    model[1].register_forward_hook(lambda module, args, output: kept.append(output))
    settings = {"num_vectors": 9, "vector_length": 3, "init_vector_bank_bound": 0.5}
    vblora.attach(model, vblora.VBLoRAConfig(target_modules=["1"], **settings), seed=1)
    with torch.no_grad():
        adapted = model(x)
    torch.testing.assert_close(kept[0], base)
    assert (adapted - base).abs().max() > 0.01


def test_gradients_through_the_sum_in_place_are_those_of_a_new_tensor():
    from vblora.low_rank import add_low_rank, add_low_rank_

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (2, 3, 4), (2, 4), (2, 5)]  # output, x, A, B transposed
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    found = []
    for add in (add_low_rank, add_low_rank_):
        result = add(leaves[0] * 2, *leaves[1:])
        found.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert type(found[1][0].grad_fn).__name__ == "_AddLowRankBackward"


def test_second_derivatives_go_through_the_sum_in_place():
    from vblora.low_rank import add_low_rank_

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3), (2, 4), (2, 4), (2, 3)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradgradcheck(lambda output, *rest: add_low_rank_(output * 2, *rest), inputs)


def test_selective_checkpointing_finds_the_outputs_that_it_kept():
    """It keeps what the base layer gave and gives it out again: that must not be what the sum was written to."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)

    class Checkpointed(nn.Module):
        def __init__(self, block, selective):
            super().__init__()
            self.block, self.selective = block, selective

        def forward(self, x):
            return (
                checkpoint(self.block, x, use_reentrant=False, context_fn=contexts) if self.selective else self.block(x)
            )

    def gradient(selective):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh())
        settings = {"num_vectors": 50, "vector_length": 4, "init_vector_bank_bound": 0.5}
        model = Checkpointed(block, selective)
        adapter = vblora.attach(model, vblora.VBLoRAConfig(target_modules=["0", "2"], **settings), seed=0)
        model(torch.randn(2, 3, 8)).square().sum().backward()
        return adapter.vector_bank.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_a_hook_of_all_modules_sees_the_base_layers_output():
    layer = nn.Sequential(nn.Linear(6, 4, bias=False))
    x, kept = torch.randn(3, 2, 6), []
    base = layer(x)
    settings = {"num_vectors": 9, "vector_length": 2, "init_vector_bank_bound": 0.5, "target_modules": ["0"]}
    vblora.attach(layer, vblora.VBLoRAConfig(**settings), seed=1)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        layer(x)
    handle.remove()
    torch.testing.assert_close(kept[0], base)
