"""Several processes: FSDP2 with the adapter left whole, DDP, and one process with the same rows."""

from __future__ import annotations

import copy
import datetime
import json
import os
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from core_helpers import adapt, build, groups_for, make_batch, run
from language_helpers import tiny_llama
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import vblora
from vblora import sharding
from vblora.switch import Adapted, FullFineTuning
from vblora_experiments import estimate
from vblora_experiments.memory import peak_bytes

WORLD = 2
STEPS = 6
WIDE = vblora.VBLoRAConfig(r=4, num_vectors=64, vector_length=64, topk=2, target_modules="all-linear")
WIDE_TOKENS = 16
CASES = [("vblora", "fsdp2"), ("vblora", "ddp"), ("tied_lora", "fsdp2")]


def adapted(method, seed=1, num_vectors=120):
    """In float64, where 1e-9 is much."""
    model = tiny_llama(50).double()
    config = {
        "vblora": vblora.VBLoRAConfig(
            r=2, num_vectors=num_vectors, vector_length=16, topk=2, target_modules="all-linear"
        ),
        "tied_lora": vblora.TiedLoRAConfig(r=2, target_modules=["q_proj", "v_proj"]),
    }[method]
    adapter = vblora.attach(model, config, seed=seed).double()
    rates = {"lr_vector_bank": 0.05, "lr_logits": 0.1} if method == "vblora" else {}
    return model, adapter, vblora.AdamW(vblora.param_groups(model, lr=1e-2, **rates))


def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 50, (2 * WORLD, 9), generator=generator) for _ in range(STEPS)]


def train(model, adapter, optimizer, mine, accumulate=lambda last: None):
    """Two rows a process and step, in two backward passes; what is trained in the end."""
    for rows in batches():
        own = rows[mine]
        for number, row in enumerate(own.split(1)):
            accumulate(number == len(own) - 1)
            (model(input_ids=row, labels=row).loss / len(own)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    return state | {name: buffer.clone() for name, buffer in adapter.named_buffers()}


def process(rank, place):
    """All cases in one pair of processes, whose start takes most of the time."""
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=WORLD, timeout=limit)
    for method, kind in CASES:
        state = (train_sharded if kind == "fsdp2" else train_parallel)(method, slice(2 * rank, 2 * rank + 2))
        torch.save(state, Path(place) / f"{method}_{kind}_{rank}.pt")
    (Path(place) / f"refused_{rank}.json").write_text(json.dumps({name: refused(name, rank) for name in REFUSED}))
    (Path(place) / f"memory_{rank}.json").write_text(json.dumps(memory_of_a_step()))
    dist.barrier()
    os._exit(0)  # not by way of the interpreter's end, in which gloo's threads have been seen to wait for ever


def shard(model, **settings):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, **settings)


def train_sharded(method, mine, **settings):
    from torch.distributed.tensor import DTensor

    model, adapter, optimizer = adapted(method, **settings)
    whole = set(adapter.parameters())
    last = [False]
    sharding.average_gradients(adapter, lambda: last[0])
    shard(model, ignored_params=whole)
    assert isinstance(model.lm_head.weight, DTensor) and not any(isinstance(p, DTensor) for p in whole)
    return train(model, adapter, optimizer, mine, lambda now: last.__setitem__(0, now))


def wide_llama():
    """A model whose weights weigh more than what a short row leaves."""
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).train()


def memory_of_a_step():
    """Bytes of this process's share of the weights, and the most that a step takes beside what there is before it."""
    model = wide_llama()
    adapter = vblora.attach(model, WIDE, seed=0)
    optimizer = vblora.AdamW(vblora.param_groups(model, lr=1e-3, lr_vector_bank=1e-3, lr_logits=1e-2))
    sharding.average_gradients(adapter)
    shard(model, ignored_params=set(adapter.parameters()))
    rows = torch.randint(3, 64, (1, WIDE_TOKENS), generator=torch.Generator().manual_seed(0))

    def step():
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    share = sum(p.to_local().nbytes for p in model.parameters() if hasattr(p, "to_local"))
    # A process that is ahead of the other holds more than it needs, blocks gathered that wait: the least of some steps.
    return {"share": share, "peak": min(peak_bytes(step) for _ in range(5))}


def train_parallel(method, mine):
    model, adapter, optimizer = adapted(method)
    parallel = DistributedDataParallel(model)
    return train(parallel, adapter, optimizer, mine, lambda now: setattr(parallel, "require_backward_grad_sync", now))


def sharded_whole(optimizer_first):
    """`fully_shard` of everything, before or after the optimiser is made."""
    model, adapter, optimizer = adapted("vblora")
    shard(model)
    if not optimizer_first:
        vblora.AdamW(model.parameters())
    train(model, adapter, optimizer, slice(None))


REFUSED = {
    "all sharded, then groups": (
        lambda rank: [shard(model := adapted("vblora")[0]), vblora.param_groups(model, 1e-2, 1e-2, 1e-2)],
        "divided over processes (DTensor)",
    ),
    "all sharded, then AdamW": (lambda rank: sharded_whole(False), "ignored_params"),
    "AdamW, then all sharded": (lambda rank: sharded_whole(True), "ignored_params"),
    "other seeds": (lambda rank: train_sharded("vblora", slice(None), seed=1 + rank), "init_seed is 1 on rank 0 and 2"),
    "other settings": (
        lambda rank: sharding.require_equal(adapted("vblora", num_vectors=120 + rank)[1]),
        "num_vectors is 120 on rank 0 and 121 on rank 1",
    ),
    "other values": (lambda rank: sharding.require_equal(changed(rank)), "the digest of the values"),
}


def changed(rank):
    adapter = adapted("vblora")[1]
    with torch.no_grad():
        adapter.vector_bank[0, 0] += rank
    return adapter


def refused(name, rank):
    try:
        REFUSED[name][0](rank)
    except ValueError as error:
        return str(error)
    return "taken"


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="gloo is not there")
def test_two_processes_train_what_one_does_with_all_rows(tmp_path):
    multiprocessing.spawn(process, (str(tmp_path),), nprocs=WORLD)
    for method, kind in CASES:
        model, adapter, optimizer = adapted(method)
        before = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
        expected = train(model, adapter, optimizer, slice(None))
        assert any((expected[name] - value).abs().max() > 0.01 for name, value in before.items())
        files = [tmp_path / f"{method}_{kind}_{rank}.pt" for rank in range(WORLD)]
        states = [torch.load(file, weights_only=True) for file in files]
        for name, value in expected.items():
            assert torch.equal(states[0][name], states[1][name]), (method, kind, name)
            torch.testing.assert_close(states[0][name], value, rtol=1e-9, atol=1e-9)
    for rank in range(WORLD):
        said = json.loads((tmp_path / f"refused_{rank}.json").read_text())
        assert {name: text for name, text in said.items() if REFUSED[name][1] not in text} == {}

    model = wide_llama()
    base, count = sum(p.nbytes for p in model.parameters()), vblora.attach(model, WIDE, seed=0).layout.rows
    composed = estimate.vblora_bytes(count, WIDE, 4)[1]
    parts = estimate.memory(wide_llama(), base, 0, composed, WIDE_TOKENS, False, 4)
    for rank in range(WORLD):
        measured = json.loads((tmp_path / f"memory_{rank}.json").read_text())
        assert measured["share"] == pytest.approx(base / WORLD, rel=0.01)
        assert estimate.divided(parts, WORLD) == pytest.approx(measured["share"] + measured["peak"], rel=0.15)


def flat(optimizer):
    """What DeepSpeed's ZeRO-1 and 2 do to an optimiser: one flat tensor stands for a group's parameters."""
    for group in optimizer.param_groups:
        whole = torch.cat([p.detach().reshape(-1) for p in group["params"]])
        group["params"] = [torch.nn.Parameter(whole)]
        group["params"][0].grad = torch.zeros_like(whole)


@pytest.mark.parametrize("copied", [False, True])
def test_an_optimiser_whose_logits_have_gone_refuses_its_step(copied):
    model, _, optimizer = adapted("vblora")
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
        train(model, model.vblora_adapter, optimizer, slice(None))
    before = [p.detach().clone() for p in model.parameters()]
    flat(optimizer)
    with pytest.raises(ValueError, match="DeepSpeed's ZeRO"):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_whole_parameter_in_the_place_of_the_logits_is_found():
    model, adapter, _ = adapted("vblora")
    adapter.topk_logits = torch.nn.Parameter(adapter.topk_logits.detach().clone())
    before = adapter.topk_indices.clone()
    train(model, adapter, vblora.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1), slice(None))
    assert not torch.equal(adapter.topk_indices, before)


def test_frozen_logits_need_no_optimiser():
    model, adapter, optimizer = adapted("vblora")
    optimizer.param_groups = [group for group in optimizer.param_groups if group["name"] != "logits"]
    adapter.topk_logits.requires_grad_(False)
    train(model, adapter, optimizer, slice(None))


def accelerator(kind, version=2, stage=2):
    plugin = types.SimpleNamespace(fsdp_version=version, ignored_modules=None)
    state = types.SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=types.SimpleNamespace(zero_stage=stage))
    return types.SimpleNamespace(distributed_type=f"DistributedType.{kind}", state=state, sync_gradients=True)


def test_accelerate_is_told_what_to_leave_whole():
    model, adapter, _ = adapted("vblora")
    told = accelerator("FSDP")
    sharding.prepare(Adapted(model, adapter), told)
    assert told.state.fsdp_plugin.ignored_modules == [adapter]
    alone = accelerator("NO")
    sharding.prepare(Adapted(model, adapter), alone)
    assert alone.state.fsdp_plugin.ignored_modules is None


def test_what_flattens_parameters_is_refused():
    model, adapter, _ = adapted("vblora")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        sharding.prepare(Adapted(model, adapter), accelerator("FSDP", version=1))
    with pytest.raises(ValueError, match="DeepSpeed divides"):
        sharding.prepare(Adapted(model, adapter), accelerator("DEEPSPEED"))
    full = Adapted(model, FullFineTuning(model))
    sharding.prepare(full, accelerator("DEEPSPEED", stage=2))
    for kind, stage in (("DEEPSPEED", 3), ("FSDP", 0)):
        with pytest.raises(ValueError, match="for this project's own adapters"):
            sharding.prepare(full, accelerator(kind, stage=stage))


def test_the_configurations_are_accelerates_own():
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    folder = Path(__file__).resolve().parents[1] / "instruction_tuning" / "configs"
    kinds = {path.stem: config_args.load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    assert {name: str(found.distributed_type) for name, found in kinds.items()} == {
        "ddp": "DistributedType.MULTI_GPU",
        "fsdp2": "DistributedType.FSDP",
        "deepspeed_zero2": "DistributedType.DEEPSPEED",
    }
    assert kinds["fsdp2"].fsdp_config["fsdp_version"] == 2


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone, over a file."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_fsdp_1_is_refused_whenever_the_optimiser_is_made(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrapped(model):
        model.requires_grad_(True)  # FSDP 1 wants one kind in a flat piece
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))

    model = build("stack")
    adapt(model)
    optimizer = vblora.AdamW(groups_for(model))
    with pytest.raises(ValueError, match="flat piece, as FSDP 1 makes"):
        run(wrapped(model), make_batch("stack")).sum().backward()
    with pytest.raises(ValueError, match="flat piece, as FSDP 1 makes"):
        optimizer.step()
    model = build("stack")
    adapt(model)
    whole = wrapped(model)
    for make in (lambda: vblora.AdamW(whole.parameters(), lr=1e-3), lambda: groups_for(whole)):
        with pytest.raises(ValueError, match="flat piece, as FSDP 1 makes"):
            make()


def test_a_part_of_the_logits_is_refused():
    """What FSDP 1 with use_orig_params leaves in the parameter between passes, on each of several processes."""
    model = build("stack")
    adapter = adapt(model)
    optimizer = vblora.AdamW(groups_for(model))
    adapter.topk_logits.data = adapter.topk_logits.data.flatten()[:5]
    with pytest.raises(ValueError, match=r"a part of themselves.*use_orig_params"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"a part of themselves.*use_orig_params"):
        groups_for(model)
