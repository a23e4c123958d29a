"""Experts, which transformers keeps in parameters of three dimensions, held against weights merged by hand."""

import copy
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
import transformers
from core_helpers import assert_unchanged, config_for, groups_for, snapshot, stir
from torch import nn

import vblora
from vblora import cli
from vblora.files import packed
from vblora.files.describe import describe
from vblora.files.lora import write_lora
from vblora.io import read_tensors
from vblora.serving.expanded import Cache, Expanded, Limit, PackedFolder

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def build(kind="mixtral", dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24)
    else:
        config = transformers.GptOssConfig(**SIZES, num_local_experts=4, sliding_window=8)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "sinks" in name:  # transformers starts them at zero
                parameter.normal_(std=0.2)
    return model


def adapt(model, method="vblora", name=None, **settings):
    given = {"target_modules": "all-linear", "target_parameters": EXPERTS, **settings}
    return stir(vblora.attach(model, config_for(method, **given), name=name, seed=3))


def logits(model, **more):
    return model(IDS, **more).logits


def by_hand(adapter, bank, chosen):
    """B A of each target, from the bank (h, b) and the selected logits (N, k): sub-vector by sub-vector."""
    b, r = adapter.config.vector_length, adapter.config.r
    rows = iter(zip(adapter.topk_indices, chosen.softmax(-1), strict=True))

    def factor(width):
        found = []
        for _ in range(r):
            tiles = []
            for _ in range(-(-width // b)):
                indices, weights = next(rows)
                tiles.append(sum(w * bank[i] for i, w in zip(indices, weights, strict=True)))
            found.append(torch.cat(tiles)[:width])
        return torch.stack(found)  # (r, width)

    deltas = {}
    for shape in adapter.shapes:
        a = factor(shape.in_features)
        deltas[shape.name] = factor(shape.out_features).T @ a  # (out, in)
    assert next(rows, None) is None
    return deltas


def merged_by_hand(model, deltas):
    """The model's parameters with these sums, by name."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if "_adapter." not in name}
    for name, delta in deltas.items():
        if f"{name}.weight" in parameters:
            parameters[f"{name}.weight"] = parameters[f"{name}.weight"] + delta
            continue
        stack, _, number = name.rpartition(".")
        own = delta.T if parameters[stack].shape[1:] != delta.shape or "gpt" in type(model).__name__.lower() else delta
        sums = torch.zeros_like(parameters[stack]).index_put((torch.tensor(int(number)),), own)
        parameters[stack] = parameters[stack] + sums
    return parameters


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_weights_merged_by_hand(kind):
    model = build(kind, torch.float64)
    model.set_experts_implementation("eager")  # the others take no float64
    base = copy.deepcopy(model)
    before = logits(model).detach()
    adapter = adapt(model)
    adapter.double()
    found = logits(model)
    found.square().sum().backward()
    leaves = [p.detach().clone().requires_grad_() for p in (adapter.vector_bank, adapter.topk_logits)]
    expected = torch.func.functional_call(base, merged_by_hand(base, by_hand(adapter, *leaves)), (IDS,)).logits
    expected.square().sum().backward()
    assert (found - before).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for parameter, leaf in zip((adapter.vector_bank, adapter.topk_logits), leaves, strict=True):
        torch.testing.assert_close(parameter.grad, leaf.grad, rtol=1e-9, atol=1e-9)
    assert len(adapter.targets) == 2 * (4 + 2 * 4)  # layers of (attention + two parameters of four experts)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_saved_packed_and_written_whole_it_is_the_same(kind, tmp_path):
    model = build(kind)
    before = snapshot(model)
    adapter = adapt(model)
    expected = logits(model).detach()
    adapter.save(tmp_path / "topk")
    adapter.save(tmp_path / "full", form="full")
    adapter.pack(tmp_path / "packed")
    model.save_pretrained(tmp_path / "whole")
    adapter.merge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    adapter.unmerge()
    adapter.detach()
    assert_unchanged(model, before)
    for form in ("topk", "full", "packed"):
        again = build(kind)
        vblora.load(again, tmp_path / form, strict_base=True)
        torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parameters", [EXPERTS, ["down_proj"], ["gate_up_proj"]], ids=["both", "down", "gate_up"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_exported_lora(kind, parameters, tmp_path):
    model = build(kind)
    adapter = adapt(model, target_parameters=parameters, target_modules=["q_proj", "v_proj"])
    expected = logits(model).detach()
    adapter.export_lora(tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(build(kind), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(build(kind))).abs().max() > 0.1


def test_the_exported_layout_by_hand(tmp_path):
    """What vLLM 0.33's FusedMoE3DWithLoRA makes of the file: one reshape for A, another for B."""
    adapter = adapt(build())
    adapter.export_lora(tmp_path / "lora")
    tensors, _ = read_tensors(tmp_path / "lora" / "adapter_model.safetensors")
    factors = adapter.layer_factors()
    for parameter, ending in (("gate_up_proj", ".base_layer"), ("down_proj", "")):
        key = f"base_model.model.model.layers.1.mlp.experts{ending}"
        a = tensors[f"{key}.lora_A.weight"].reshape(4, 2, -1)  # (E, r, in)
        b = tensors[f"{key}.lora_B.weight"]
        b = b.reshape(len(b), -1, 4).permute(2, 0, 1)  # (E, out, r)
        for expert in range(4):
            own_a, own_b = factors[f"model.layers.1.mlp.experts.{parameter}.{expert}"]
            assert torch.equal(a[expert], own_a) and torch.equal(b[expert], own_b)


def test_experts_alone(tmp_path):
    model = build()
    adapter = adapt(model, target_modules=None, target_parameters=["experts.down_proj"])
    assert len(adapter.targets) == 8
    expected = logits(model).detach()
    adapter.save(tmp_path / "saved")
    adapter.pack(tmp_path / "packed")
    adapter.export_lora(tmp_path / "lora")
    for form in ("saved", "packed"):
        again = vblora.load(model_again := build(), tmp_path / form)
        torch.testing.assert_close(logits(model_again), expected, rtol=1e-4, atol=1e-4)
        assert again.config.target_parameters == ["experts.down_proj"] and not again.config.target_modules
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)


def test_the_commands_take_it(tmp_path, capsys):
    model = build()
    model.save_pretrained(tmp_path / "base")
    adapter = adapt(model)
    expected = logits(model).detach()
    adapter.save(tmp_path / "adapter")
    given = [str(tmp_path / name) for name in ("adapter", "packed", "base", "lora")]
    assert cli.main(["pack", given[0], given[1], "--model", given[2]]) == 0
    assert cli.main(["export", given[2], given[3], "--adapter", given[0]]) == 0
    assert cli.main(["export", given[1], f"{given[3]}2"]) == 0
    for lora in (given[3], f"{given[3]}2"):
        theirs = peft.PeftModel.from_pretrained(build(), lora).eval()
        torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert cli.main(["inspect", given[1]]) == 0
    assert "24, of which 16 experts, of" in capsys.readouterr().out
    assert describe(tmp_path / "packed")["experts"] == 16
    assert cli.main(["inspect", given[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["target_parameters"] == EXPERTS


def test_what_is_stored_by_hand():
    adapter = adapt(build())
    h, b, r = 12, 8, 2
    attention = (4 + 4) + 2 * (4 + 2) + (4 + 4)  # tiles of 8: q and o 32 to 32, k and v 32 to 16
    experts = 4 * ((4 + 6) + (3 + 4))  # gate_up 32 to 48, down 24 to 32
    n = 2 * r * (attention + experts)
    assert adapter.stored_parameters().parameters == h * b + n + n // 2
    assert sum(p.numel() for p in adapter.parameters()) == h * b + 2 * n


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    found = []
    for checkpointing in (False, True):
        model = build("qwen3_moe").train()
        adapter = adapt(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        logits(model, use_cache=False).square().sum().backward()
        found.append([p.grad for p in adapter.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_training_lowers_the_loss_and_goes_on_from_a_file(tmp_path):
    model = build().train()
    adapter = adapt(model, init_vector_bank_bound=0.02)
    optimizer = vblora.AdamW(groups_for(model, lr=5e-2))

    def step(model, optimizer):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step(model, optimizer) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    adapter.save(tmp_path / "full", form="full")
    again = build().train()
    vblora.load(again, tmp_path / "full")
    assert model(IDS, labels=IDS).loss.item() == again(IDS, labels=IDS).loss.item()


def test_in_bfloat16_it_trains_in_float32():
    model = build("gpt_oss", torch.bfloat16)
    adapter = adapt(model)
    found = logits(model)
    found.float().square().sum().backward()
    exact = build("gpt_oss", torch.bfloat16).float()
    vblora.attach(exact, adapter.config, seed=3)
    expected = logits(exact)
    assert found.dtype == torch.bfloat16 and adapter.vector_bank.grad.dtype == torch.float32
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_dropout_is_of_the_experts_input_and_in_training_alone():
    model = build()
    adapter = adapt(model, target_modules=None, vblora_dropout=0.5)
    first = logits(model)
    assert torch.equal(first, logits(model))
    adapter.train()
    assert not torch.equal(first, logits(model))


def test_two_adapters_add_up_and_each_goes_off_alone():
    model = build()
    first = adapt(model, name="one", target_modules=None)
    alone = logits(model)
    second = adapt(model, name="two", target_modules=["q_proj"], target_parameters=["down_proj"])
    both = logits(model)
    first.merge()
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-4)
    first.unmerge()
    second.detach()
    assert torch.equal(logits(model), alone)
    with first.disabled():
        assert torch.equal(logits(model), logits(build()))
    first.detach()
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_copies_and_pickles_have_experts_of_their_own():
    model = build()
    adapter = adapt(model)
    expected = logits(model)
    copied, restored = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        adapter.vector_bank.zero_()
    assert not torch.equal(logits(model), expected)
    for other in (copied, restored):
        assert torch.equal(logits(other), expected)
        other.vblora_adapter.merge()
        torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), logits(build()))


def test_threads_and_generation_give_what_one_pass_and_merged_weights_do():
    model = build("qwen3_moe")
    adapter = adapt(model)
    expected = [logits(model) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: logits(model), range(8)))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(IDS, **settings)
    adapter.merge()
    assert torch.equal(model.generate(IDS, **settings), tokens)


ONE, OTHER = torch.tensor([[0, 1], [0, 1], [1, 0]]), torch.tensor([[3, 2], [1, 0], [3, 1]])


class Twice(nn.Module):
    """One module of experts in two places, called by position and by name."""

    def __init__(self):
        super().__init__()
        self.one = build("gpt_oss").model.layers[0].mlp.experts
        self.two = self.one

    def forward(self, x, chosen=ONE):
        weights = torch.full((3, 2), 0.5)
        return self.two(self.one(x, chosen, weights), top_k_weights=weights, top_k_index=chosen)


def test_experts_in_two_places_are_adapted_once():
    model = Twice()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = model(x)
    adapter = adapt(model, target_modules=None, target_parameters=["gate_up_proj", "down_proj"])
    assert len(adapter.targets) == 8
    expected = model(x)
    assert (expected - before).abs().max() > 0.1
    adapter.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_traced_and_transformed_other_experts_may_be_chosen():
    model = Twice()
    adapter = adapt(model, target_modules=None, target_parameters=["gate_up_proj", "down_proj"])
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    traced = torch.jit.trace(model, (x, ONE), check_trace=False)
    torch.testing.assert_close(traced(x, OTHER), model(x, OTHER), rtol=1e-4, atol=1e-4)

    def summed(bank):
        return torch.func.functional_call(model, {"vblora_adapter.vector_bank": bank}, (x,)).sum()

    found = torch.func.grad(summed)(adapter.vector_bank.detach())
    model(x).sum().backward()
    torch.testing.assert_close(found, adapter.vector_bank.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["tied_lora", "lora_xs"])
def test_other_methods_take_experts(method):
    model = build()
    before = logits(model)
    adapter = adapt(model, method=method)
    expected = logits(model).detach()
    assert (expected - before).abs().max() > 1e-3
    adapter.merge()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_compiled_it_gives_the_same():
    model = build()
    adapt(model)
    expected = logits(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-4)


def test_offloaded_experts_are_brought_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = build()
    adapt(model)
    expected = logits(model).detach()
    other = build()
    accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
    adapter = adapt(other)
    with torch.no_grad():
        torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="is offloaded: load the base model in memory to merge"):
        adapter.merge()


def test_the_recipe_counts_experts():
    chosen = vblora.recipe(build(), ["q_proj"], target_parameters=EXPERTS)
    adapter = vblora.attach(build(), chosen.config, seed=0)
    assert len(adapter.targets) == 18 and adapter.stored_parameters() == chosen.stored


class Unknown(nn.Module):
    def __init__(self, **flags):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 8))
        self.down_proj = nn.Parameter(torch.zeros(2, 8, 2))
        for name, value in flags.items():
            setattr(self, name, value)


KNOWN = {"is_transposed": False, "has_bias": False, "has_gate": True}
REFUSED = {
    "nothing": (build, ["experts.gate_up"], r"no parameter of MixtralForCausalLM is called experts\.gate_up; those"),
    "one of two": (build, [*EXPERTS, "w1"], r"no parameter of MixtralForCausalLM is called w1; those of three dimen"),
    "two dimensions": (build, ["gate.weight"], r"mlp\.gate\.weight has 2 dimensions, and target_parameters take"),
    "layout": (lambda: Unknown(), ["down_proj"], r"Unknown does not say how it keeps its experts \(is_transposed"),
    "function": (lambda: Unknown(**KNOWN), ["down_proj"], r"is none of the .* known here: Unknown has no _apply_gate"),
    "parameter": (
        lambda: Unknown(**{**KNOWN, "has_gate": False}, up_proj=torch.zeros(2, 2, 8), act_fn=torch.tanh),
        ["gate_up_proj"],
        r"gate_up_proj is none of the parameters up_proj and down_proj of a module of experts",
    ),
    "whole numbers": (
        lambda: build().to(torch.float8_e4m3fn),
        ["experts.down_proj"],
        r"down_proj is quantised \(torch\.float8_e4m3fn\), and experts are adapted in 16 or 32 bits",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_stack_of_experts_is_refused(case):
    make, parameters, message = REFUSED[case]
    model = make()
    names = dict(model.named_parameters()).keys()
    with pytest.raises(ValueError, match=message) as caught:
        vblora.attach(model, config_for("vblora", target_modules=None, target_parameters=parameters))
    assert "\n" not in str(caught.value)
    assert dict(model.named_parameters()).keys() == names and not hasattr(model, "vblora_adapter")


def test_names_that_are_no_list_are_refused():
    with pytest.raises(ValueError, match="target_parameters takes a list of names, not 'experts'"):
        vblora.VBLoRAConfig(target_parameters="experts")


def test_divided_experts_are_refused():
    model = build()
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj is divided over processes"):
        adapt(model)


def test_experts_are_not_split():
    model = nn.ModuleDict({"dense": nn.ModuleDict({"gate_up_proj": nn.Linear(8, 8)}), "experts": Unknown()})
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj holds experts, which split_modules cannot split"):
        adapt(model, split_modules={"gate_up_proj": ["gate", "up"]})


def test_experts_trained_in_full_are_not_adapted(tmp_path):
    model = build()
    adapter = adapt(model, modules_to_save=["layers.0.mlp"])
    assert not [name for name in adapter.targets if "layers.0.mlp" in name]
    adapter.export_lora(tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert settings["target_parameters"] == [f"model.layers.1.mlp.{name}" for name in EXPERTS]


def test_an_export_without_an_expert_is_refused(tmp_path):
    factors = {f"experts.down_proj.{n}": (torch.zeros(2, 4), torch.zeros(6, 2)) for n in (0, 2)}
    with pytest.raises(ValueError, match=r"experts\.down_proj\.2 is not the next expert of experts\.down_proj"):
        write_lora(tmp_path / "lora", factors, base_model=None, target_parameters=["experts.down_proj"])
    assert not (tmp_path / "lora").exists()


def test_peft_and_a_store_say_that_they_take_no_experts(tmp_path):
    model = build()
    adapter = adapt(model)
    with pytest.raises(ValueError, match=r"PEFT's VB-LoRA adapts no experts \(target_parameters experts\.gate_up_proj"):
        adapter.save(tmp_path / "peft", format="peft")
    adapter.pack(tmp_path / "one.vblora.safetensors")
    adapter.detach()
    store = vblora.AdapterStore(model, tmp_path)
    message = r"adapter 'one': it adapts experts \(target_parameters\), where the tokens"
    with pytest.raises(ValueError, match=message), store.rows(["one", None]):
        logits(model)


def test_a_file_may_be_smaller_than_the_names_of_its_experts(tmp_path):
    sizes = {**SIZES, "hidden_size": 8, "num_hidden_layers": 30, "moe_intermediate_size": 8, "intermediate_size": 8}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**sizes, num_experts=128))
    settings = {"r": 1, "num_vectors": 64, "vector_length": 8, "topk": 1, "target_modules": ["q_proj"]}
    adapter = vblora.attach(model, vblora.VBLoRAConfig(**settings, target_parameters=EXPERTS), seed=0)
    size = adapter.pack(tmp_path / "packed", selection="seed")
    assert 16 * size + 2**16 < sum(len(shape.name) for shape in adapter.shapes)
    assert packed.read(tmp_path / "packed").shapes == adapter.shapes


def test_the_plug_in_of_vllm_takes_gpt_oss_alone(tmp_path):
    for kind, parameters in {"gpt_oss": EXPERTS, "mixtral": EXPERTS, "half": ["down_proj"]}.items():
        model = build("gpt_oss" if kind == "half" else kind)
        model.save_pretrained(tmp_path / kind)
        model.config._name_or_path = str(tmp_path / kind)
        adapter = adapt(model, target_modules=["q_proj"], target_parameters=parameters)
        (tmp_path / "adapters").mkdir(exist_ok=True)
        adapter.pack(tmp_path / "adapters" / f"{kind}.safetensors")
    found = Expanded(PackedFolder(tmp_path / "adapters"), Cache(tmp_path / "cache", Limit.of("1GB")), frozenset())
    lora = found.find("gpt_oss", str(tmp_path / "gpt_oss"))
    theirs = peft.PeftModel.from_pretrained(build("gpt_oss"), str(lora)).eval()
    assert (logits(theirs) - logits(build("gpt_oss"))).abs().max() > 0.1
    for kind, message in {"mixtral": "for GPT-OSS alone", "half": "takes experts with both alone"}.items():
        with pytest.raises(ValueError, match=message):
            found.find(kind, str(tmp_path / kind))


def test_a_file_for_another_number_of_experts_is_refused(tmp_path):
    adapt(build()).pack(tmp_path / "packed")
    config = transformers.MixtralConfig(**SIZES, num_local_experts=3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match=r"no linear layer or expert 'model\.layers\.0\.mlp\.experts\.gate_up_proj\.3'"
    ):
        vblora.load(model, tmp_path / "packed")


def test_what_stays_out_beside_target_parameters_is_still_said():
    with pytest.warns(UserWarning, match=r"2 parameters of experts stay as they are, .*down_proj and its like"):
        adapt(build(), target_parameters=["experts.gate_up_proj"])


def test_without_target_parameters_nothing_of_experts_is_loaded():
    code = (
        "import sys, torch, vblora; model = torch.nn.Sequential(torch.nn.Linear(8, 8)); "
        "vblora.attach(model, vblora.VBLoRAConfig(r=2, target_modules=['0'], num_vectors=8, vector_length=4)); "
        "model(torch.ones(1, 8)).sum().backward(); "
        "own = [name for name in sys.modules if name.partition('.')[0] == 'vblora']; "
        "print(len(own), 'vblora.experts' in own)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["20", "False"]
