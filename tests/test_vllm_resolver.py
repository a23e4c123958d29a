"""Packed adapters on demand: names from outside, broken files, a cache with a bound and several users.

vLLM's own two modules are stood in for, except in the last test, which runs the real server where vLLM is installed.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
import threading
import types
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import pytest
import torch
from core_helpers import adapt, build, config_for
from language_helpers import save_tiny_llama, vllm_environment
from safetensors.torch import load_file

import vblora
from vblora.files import packed
from vblora.serving.expanded import Cache, Expanded, Limit, PackedFolder, _expanded_bytes

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class Registry:
    def __init__(self):
        self.resolvers = {}

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, name, resolver):
        self.resolvers[name] = resolver


@pytest.fixture
def resolver_module(monkeypatch):
    """vblora.serving.vllm_resolver on stand-ins for vLLM's modules."""
    request, resolver = types.ModuleType("vllm.lora.request"), types.ModuleType("vllm.lora.resolver")
    request.LoRARequest = LoRARequest
    resolver.LoRAResolver, resolver.LoRAResolverRegistry = type("LoRAResolver", (), {}), Registry()
    for name, module in {
        "vllm": types.ModuleType("vllm"),
        "vllm.lora": types.ModuleType("vllm.lora"),
        "vllm.lora.request": request,
        "vllm.lora.resolver": resolver,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vblora.serving.vllm_resolver", raising=False)
    yield importlib.import_module("vblora.serving.vllm_resolver")
    sys.modules.pop("vblora.serving.vllm_resolver", None)


@pytest.fixture
def folder(tmp_path):
    """A folder with the adapters alice, bob and carol for a tiny Llama called some/model."""
    for seed, name in enumerate(("alice", "bob", "carol")):
        pack(tmp_path / "adapters" / f"{name}.vblora.safetensors", seed=seed)
    return tmp_path / "adapters"


def pack(path, base="some/model", method="vblora", kind="llama", **settings):
    model = build(kind)
    model.config._name_or_path = base
    adapter = adapt(model, method, kind, **{"target_modules": ["q_proj", "v_proj"], **settings})
    adapter.pack(path)
    return adapter


def expanded(folder, cache, size="10GB", bases=()):
    return Expanded(PackedFolder(folder), Cache(Path(cache), Limit.of(size)), frozenset(bases))


def entries(cache):
    return sorted(p.name.rpartition("-")[0] for p in Path(cache).iterdir() if not p.name.startswith("."))


# --- names and files -------------------------------------------------------------------------------------------------


def test_an_adapter_is_expanded_once(folder, tmp_path):
    store = expanded(folder, tmp_path / "cache")
    path = store.find("alice", "some/model")
    tensors = load_file(path / "adapter_model.safetensors")
    expected = packed.read(folder / "alice.vblora.safetensors").factors()
    for name, (a, b) in expected.items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], a)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], b)
    written = (path / "adapter_config.json").stat().st_ino
    assert store.find("alice", "some/model") == path
    assert (path / "adapter_config.json").stat().st_ino == written
    assert store.find("bob", "some/model") != path
    assert entries(tmp_path / "cache") == ["alice", "bob"]


def test_a_new_file_of_the_same_name_is_a_new_adapter(folder, tmp_path):
    store = expanded(folder, tmp_path / "cache")
    before = store.find("alice", "some/model")
    (folder / "bob.vblora.safetensors").replace(folder / "alice.vblora.safetensors")
    assert store.find("alice", "some/model") != before and before.is_dir()


HOSTILE = [
    "../adapters/alice",
    "..",
    ".",
    "",
    "/etc/passwd",
    "alice/",
    "a/../alice",
    "alice\0",
    "alice\n",
    " alice",
    ".alice",
    "a..b",
    "al\\ice",
    "%2e%2e%2falice",
    "älice",
    "alice*",
    "$(id)",
    "~",
    "a" * 129,
    "a" * 100_000,
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("remote", [False, True])
def test_hostile_names_are_not_found(name, remote, folder, tmp_path):
    for there in (".alice", "a..b"):
        (folder / f"{there}.safetensors").write_bytes((folder / "alice.vblora.safetensors").read_bytes())
    place = f"memory://{tmp_path.name}" if remote else folder
    store = expanded(place, tmp_path / "cache")
    assert store.find(name, "some/model") is None
    assert entries(tmp_path / "cache") == []


def test_a_link_that_leaves_the_folder_is_refused(folder, tmp_path):
    (folder / "alice.vblora.safetensors").replace(tmp_path / "secret.safetensors")
    (folder / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "dangling.safetensors").symlink_to(tmp_path / "nothing")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    (folder / "within.safetensors").symlink_to("bob.vblora.safetensors")
    store = expanded(folder, tmp_path / "cache")
    for name in ("out", "dangling"):
        with pytest.raises(ValueError, match="is a link out of the folder"):
            store.find(name, "some/model")
    with pytest.raises((ValueError, OSError)):
        store.find("loop", "some/model")
    assert store.find("within", "some/model") is not None


def test_what_is_no_packed_adapter_is_refused(folder, tmp_path, monkeypatch):
    whole = (folder / "alice.vblora.safetensors").read_bytes()
    (folder / "empty.safetensors").touch()
    (folder / "cut.safetensors").write_bytes(whole[:-1])
    (folder / "flipped.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    pack(folder / "xs.safetensors", method="lora_xs")
    store = expanded(folder, tmp_path / "cache")
    for name in ("empty", "cut", "flipped", "folder", "pipe", "xs"):
        with pytest.raises(ValueError):
            store.find(name, "some/model")
    monkeypatch.setattr("vblora.files.packed.MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="more than the 1,000 allowed"):
        store.find("alice", "some/model")
    assert store.find("nobody", "some/model") is None
    assert entries(tmp_path / "cache") == []


def test_the_base_model_must_be_the_served_one(folder, tmp_path):
    pack(folder / "any.safetensors", base="")
    store = expanded(folder, tmp_path / "cache")
    with pytest.raises(ValueError, match="made for 'some/model', and 'other/model' is served"):
        store.find("alice", "other/model")
    assert store.find("any", "other/model") is not None
    assert expanded(folder, tmp_path / "cache", bases=["some/model"]).find("alice", "other/model") is not None


@pytest.mark.parametrize("remote", [False, True])
def test_adapters_that_share_a_bank(remote, folder, tmp_path):
    packed.write(packed.read(folder / "alice.vblora.safetensors"), folder / "bob.vblora.safetensors", bank="shared")
    (bank,) = folder.glob("*.bank.safetensors")
    place = f"memory://{tmp_path.name}"
    for path in folder.iterdir():
        fsspec.filesystem("memory").pipe_file(f"{place}/{path.name}", path.read_bytes())
    store = expanded(place if remote else folder, tmp_path / "cache")
    ours, theirs = (store.find(name, "some/model") / "adapter_model.safetensors" for name in ("alice", "bob"))
    assert ours.read_bytes() == theirs.read_bytes()
    if not remote:
        bank.unlink()
        with pytest.raises(ValueError, match="the bank that it shares with others, is not there"):
            store.find("bob", "some/model")
    else:
        with pytest.raises(ValueError, match="no packed adapter"):
            store.find(bank.name.removesuffix(".safetensors"), "some/model")


def test_an_adapter_for_other_layers_is_refused(tmp_path):
    base = save_tiny_llama(tmp_path / "base")  # width 32
    (tmp_path / "link").symlink_to(base)
    for name, settings in {"good": {}, "narrow": {"hidden": 16}, "deep": {"layers": 3}}.items():
        model = build("llama", **{"hidden": 32, "layers": 2, **settings})
        model.config._name_or_path = str(base)
        packed.write(
            vblora.attach(model, config_for("vblora", "llama", target_modules=["q_proj"]), seed=0).content(),
            tmp_path / "adapters" / f"{name}.safetensors",
        )
    content = packed.read(tmp_path / "adapters" / "good.safetensors")
    renamed = [shape._replace(name=shape.name.removeprefix("model.")) for shape in content.shapes]
    packed.write(replace(content, shapes=renamed), tmp_path / "adapters" / "renamed.safetensors")
    store = expanded(tmp_path / "adapters", tmp_path / "cache")
    for name in ("narrow", "deep", "renamed"):
        with pytest.raises(ValueError, match=f"{name} does not fit this LlamaForCausalLM"):
            store.find(name, str(base))
    assert store.find("good", str(tmp_path / "link")) is not None


def test_adapters_under_a_url(folder, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.makedirs("/shelf", exist_ok=True)
    for path in folder.iterdir():
        memory.pipe_file(f"/shelf/{path.name}", path.read_bytes())
    store = expanded("memory://shelf", tmp_path / "cache")
    assert store.find("alice", "some/model") is not None
    assert store.find("nobody", "some/model") is None
    local = expanded(f"file://{folder}", tmp_path / "cache")
    assert local.find("alice", "some/model") == store.find("alice", "some/model")


@pytest.mark.parametrize("place", ["/no/such/folder", "nosuchscheme://bucket"])
def test_a_place_that_cannot_be_read_is_refused_at_once(place):
    with pytest.raises(ValueError):
        PackedFolder(place)


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0", "", "-1", "ten", "10 G", "1.5GB", "0MB"])
def test_a_limit_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="number of adapters, or bytes such as 10GB, not"):
        Limit.of(text)


def test_limits():
    assert Limit.of("7") == (7, None) and Limit.of("20 MB") == (None, 20_000_000)


def find_and_end(folder, cache, size, *names):
    """What a server that has ended leaves of the cache."""
    store = expanded(folder, cache, size)
    for name in names:
        store.find(name, "some/model")
    del store  # and with it the lock


def test_the_least_recently_used_go(folder, tmp_path):
    cache = tmp_path / "cache"
    find_and_end(folder, cache, "2", "alice", "bob")
    find_and_end(folder, cache, "2", "alice")
    expanded(folder, cache, "2").find("carol", "some/model")
    assert entries(cache) == ["alice", "carol"]


def test_a_limit_in_bytes_holds(folder, tmp_path):
    cache = tmp_path / "cache"

    def used():
        return sum(file.stat().st_size for file in cache.rglob("[!.]*/*") if file.is_file())

    find_and_end(folder, cache, "1GB", "alice")
    most = used() + _expanded_bytes(packed.read(folder / "bob.vblora.safetensors"))
    limit = f"{most // 1000 + 1}kB"  # for two
    assert used() < _expanded_bytes(packed.read(folder / "alice.vblora.safetensors"))
    for name, there in [("bob", ["alice", "bob"]), ("carol", ["bob", "carol"]), ("alice", ["alice", "carol"])]:
        find_and_end(folder, cache, limit, name)
        assert entries(cache) == there and used() <= most
    with pytest.raises(ValueError, match=r"expanded it takes .* bytes, and the cache may have 1,000"):
        expanded(folder, tmp_path / "small", "1kB").find("alice", "some/model")


def test_what_a_running_server_was_given_stays(folder, tmp_path):
    cache = tmp_path / "cache"
    first, second = expanded(folder, cache, "2"), expanded(folder, cache, "2")
    given = [first.find("alice", "some/model"), second.find("bob", "some/model")]
    for store in (first, second):
        with pytest.raises(ValueError, match="full of 2 adapters that running servers use"):
            store.find("carol", "some/model")
    assert all(path.is_dir() for path in given)
    assert first.find("bob", "some/model") == given[1]
    del second
    with pytest.raises(ValueError, match="running servers use"):  # the first one has both
        first.find("carol", "some/model")
    del first
    assert expanded(folder, cache, "2").find("carol", "some/model") is not None
    assert entries(cache) == ["bob", "carol"]


def test_what_a_server_had_that_was_killed_may_go(folder, tmp_path):
    script = (
        "import sys; from pathlib import Path; from vblora.serving.expanded import *\n"
        "store = Expanded(PackedFolder(sys.argv[1]), Cache(Path(sys.argv[2]), Limit.of('1')))\n"
        "store.find('alice', 'some/model'); print('ready', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "cache")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"ready\n"
        store = expanded(folder, tmp_path / "cache", "1")
        with pytest.raises(ValueError, match="running servers use"):
            store.find("bob", "some/model")
        server.kill()
    store.find("bob", "some/model")
    assert entries(tmp_path / "cache") == ["bob"]


def test_remains_of_a_process_that_was_killed_are_removed(folder, tmp_path):
    cache, entry = tmp_path / "cache", f"bob-{0:032x}"
    for name in (entry, f".{entry}", f".{entry}.x7_k"):
        (cache / name).mkdir(parents=True)
    (cache / ".users").mkdir()
    (cache / ".users" / "1-dead").write_text(f"{entry}\n")
    expanded(folder, cache, "1").find("alice", "some/model")
    left = sorted(path.name for path in cache.iterdir())
    assert (
        left[:3] == [".lock", ".locks", ".users"]
        and len(left) == 4
        and not list((cache / ".locks").iterdir())
        and not (cache / ".users" / "1-dead").exists()
    )


def test_what_is_not_of_the_cache_is_not_touched(folder, tmp_path):
    others = (".ssh", "papers", "my-notes", ".users.old")
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in ("alice", "bob", "carol"):
        find_and_end(folder, tmp_path, "1", name)
    assert all((tmp_path / name / "file").exists() for name in others)
    assert len(list(folder.iterdir())) == 3


def test_a_broken_file_is_read_again_when_it_has_changed(folder, tmp_path, monkeypatch):
    reads, real = [], packed.loads
    monkeypatch.setattr(packed, "loads", lambda *given: (reads.append(1), real(*given))[1])
    file = folder / "alice.vblora.safetensors"
    whole = file.read_bytes()
    store = expanded(folder, tmp_path / "cache")
    file.write_bytes(whole[:-1])
    for again in range(3):
        with pytest.raises(ValueError, match="has not changed since" if again else "does not fit bytes"):
            store.find("alice", "some/model")
    assert len(reads) == 1
    file.write_bytes(whole)
    assert store.find("alice", "some/model") is not None and len(reads) == 2
    pack(folder / "xs.safetensors", method="lora_xs")  # whole, and cannot be expanded without its model
    for _ in range(3):
        with pytest.raises(ValueError, match=r"base model's weights"):
            store.find("xs", "some/model")
    assert len(reads) == 3 and entries(tmp_path / "cache") == ["alice"]


def test_what_is_not_the_files_fault_is_tried_again(folder, tmp_path):
    pack(folder / "with.safetensors")
    packed.write(packed.read(folder / "with.safetensors"), folder / "with.safetensors", bank="shared")
    (bank,) = folder.glob("*.bank.safetensors")
    store, first = expanded(folder, tmp_path / "cache", "1"), expanded(folder, tmp_path / "cache", "1")
    bank.rename(tmp_path / "bank")
    with pytest.raises(ValueError, match="is not there"):
        store.find("with", "some/model")
    (tmp_path / "bank").rename(bank)
    first.find("alice", "some/model")
    with pytest.raises(ValueError, match="running servers use"):
        store.find("with", "some/model")
    del first
    assert store.find("with", "some/model") is not None


def test_an_expansion_that_takes_long_keeps_no_other_waiting(folder, tmp_path, monkeypatch):
    from vblora.serving import expanded as module

    began, goes_on, real = threading.Event(), threading.Event(), module.export

    def slow(content, path, factors):
        if path.name.startswith("alice"):
            began.set()
            assert goes_on.wait(60)
        real(content, path, factors)

    monkeypatch.setattr(module, "export", slow)
    store = expanded(folder, tmp_path / "cache", "2")
    found = []
    threads = [threading.Thread(target=lambda: found.append(store.find("alice", "some/model"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert began.wait(60)
    other = expanded(folder, tmp_path / "cache", "2")
    assert other.find("bob", "some/model").is_dir()  # while alice is being written
    with pytest.raises(ValueError, match="the cache is full"):  # which has its room already
        other.find("carol", "some/model")
    goes_on.set()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and entries(tmp_path / "cache") == ["alice", "bob"]
    assert not list((tmp_path / "cache" / ".locks").iterdir())


def test_a_lock_that_is_removed_while_it_is_looked_at_keeps_nobody_waiting(folder, tmp_path, monkeypatch):
    """Between taking a lock and looking whether it is still the one at its place, another's may go."""
    from vblora.serving import expanded as module

    real, seen = os.path.samestat, []

    def samestat(one, other):
        if not seen:
            (lock,) = (tmp_path / "cache" / ".locks").iterdir()
            seen.append(lock)
            lock.unlink()
            os.stat(lock)  # not there any more
        return real(one, other)

    monkeypatch.setattr(module.os.path, "samestat", samestat)
    assert expanded(folder, tmp_path / "cache").find("alice", "some/model").is_dir()
    assert seen and not list((tmp_path / "cache" / ".locks").iterdir())
    assert expanded(folder, tmp_path / "cache").find("alice", "some/model").is_dir()


def test_many_threads_and_stores_at_once(folder, tmp_path):
    stores = [expanded(folder, tmp_path / "cache") for _ in range(4)]
    found: list[tuple[str, Path]] = []

    def ask(store, name):
        found.append((name, store.find(name, "some/model")))

    threads = [threading.Thread(target=ask, args=(s, n)) for s in stores for n in ("alice", "bob", "carol") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 36 and len(set(found)) == 3
    assert entries(tmp_path / "cache") == ["alice", "bob", "carol"]
    assert all((path / "adapter_config.json").is_file() for _, path in found)


# --- the resolver ----------------------------------------------------------------------------------------------------


def resolve(resolver, name, base="some/model"):
    return asyncio.run(resolver.resolve_lora(base, name))


def test_the_resolver_never_raises(resolver_module, folder, tmp_path, monkeypatch, caplog):
    (folder / "broken.safetensors").write_bytes(b"x" * 50)
    environment = {"VBLORA_ADAPTERS": str(folder), "VBLORA_CACHE": str(tmp_path / "cache")}
    resolver = resolver_module.from_environment(environment)
    request = resolve(resolver, "alice")
    assert request.lora_name == "alice" and request.lora_int_id > 0
    assert json.loads((Path(request.lora_path) / "adapter_config.json").read_text())["lora_alpha"] == 2
    assert resolve(resolver, "nobody") is None and resolve(resolver, "../alice") is None
    assert caplog.records == []  # whoever asks for what is not there fills no log
    assert resolve(resolver, "broken") is None and "'broken' is not served: no safetensors file" in caplog.text
    assert resolve(resolver, "bob", base="other") is None and "made for 'some/model'" in caplog.text
    monkeypatch.setattr(packed, "loads", lambda *arguments: 1 / 0)
    assert resolve(resolver, "carol") is None and "ZeroDivisionError" in caplog.text


def test_registered_by_the_environment(resolver_module, folder, tmp_path, monkeypatch):
    registry = resolver_module.LoRAResolverRegistry
    for name in ("VBLORA_ADAPTERS", "VBLORA_CACHE", "VBLORA_CACHE_SIZE", "VBLORA_BASE_MODELS"):
        monkeypatch.delenv(name, raising=False)
    resolver_module.register()
    assert registry.resolvers == {}
    monkeypatch.setenv("VBLORA_ADAPTERS", str(folder))
    monkeypatch.setenv("VBLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VBLORA_CACHE_SIZE", "3")
    monkeypatch.setenv("VBLORA_BASE_MODELS", "some/model, another")
    resolver_module.register()
    first = registry.resolvers["VB-LoRA"]
    assert first.expanded.cache.limit.adapters == 3 and first.expanded.bases == {"some/model", "another"}
    resolver_module.register()
    assert registry.resolvers["VB-LoRA"] is first


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("VBLORA_ADAPTERS", "/no/such/folder", "VBLORA_ADAPTERS: /no/such/folder: no such folder"),
        ("VBLORA_CACHE_SIZE", "much", "VBLORA_CACHE_SIZE: it is a number"),
        ("VBLORA_CACHE", "/dev/null/cache", "VBLORA_CACHE: "),
    ],
)
def test_a_wrong_environment_names_the_variable(resolver_module, folder, tmp_path, variable, value, message):
    environment = {"VBLORA_ADAPTERS": str(folder), "VBLORA_CACHE": str(tmp_path), variable: value}
    with pytest.raises(ValueError, match=message):
        resolver_module.from_environment(environment)


def test_the_entry_point_names_it():
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert (
        '[project.entry-points."vllm.general_plugins"]\nvblora_resolver = "vblora.serving.vllm_resolver:register"'
        in text
    )


# --- the real engine -------------------------------------------------------------------------------------------------


@pytest.mark.vllm
def test_the_real_server_gives_our_tokens(tmp_path):
    """scripts/serve_demo.sh, which ends with 0 only when every answer is as it must be."""
    environment = {**os.environ, "VBLORA_VLLM_VENV": str(vllm_environment())}
    command = [REPOSITORY / "scripts" / "serve_demo.sh"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
