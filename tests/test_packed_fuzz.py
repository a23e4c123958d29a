"""Packed files from anybody: some thousand damaged and hostile ones, each a ValueError or an adapter that is whole."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from core_helpers import adapt, build

from vblora.container import Raw, checksum, deserialize, serialize
from vblora.files import packed
from vblora.files.encoding import pack_bits, to_whole

SPLIT = {"target_modules": ["c_attn"], "split_modules": {"c_attn": ["q", "k", "v"]}}
HEAD = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
NASTY = [0, 1, -1, 2**31, 2**63, 10**30, 0.5, 1e308, True, None, "", "x" * 3000, [], [[]], {}, {"a": {}}, "\ud800"]


def sound():
    """Small packed files of all kinds, by name."""
    adapters = {
        "split": (adapt(build("gpt2", layers=3), kind="gpt2", **SPLIT), {}),
        "rounded": (adapt(build("stack"), topk=3), {"bank": "int8", "weights": 8}),
        "four": (adapt(build("stack"), num_vectors=20), {"bank": "int4", "weights": 8}),
        "finer": (adapt(build("stack"), num_vectors=20), {"bank": "bfloat16", "weights": 16}),
        "alone": (adapt(build("stack"), topk=1, vector_length=12, num_vectors=1), {}),
        "head": (adapt(build("bert"), kind="bert", **HEAD), {"heads": "int8"}),
        "tied": (adapt(build("stack"), "tied_lora"), {"bank": "float16"}),
        "xs": (adapt(build("bert"), "lora_xs", "bert", **HEAD), {}),
    }
    return {name: packed.dumps(adapter.content(), **settings) for name, (adapter, settings) in adapters.items()}


@pytest.fixture(scope="module")
def files():
    return sound()


def outcome(data):
    """The adapter, or None where the file was refused in the one way that is allowed."""
    try:
        content = packed.loads(data)
    except ValueError:
        return None
    # What was taken must be whole: of its own size, and fit to be used, unpacked and packed again.
    assert all(torch.isfinite(t).all() for t in content.tensors.values() if t.is_floating_point())
    assert isinstance(content.outputs, dict)
    try:
        factors = content.factors(most_bytes=2**20)
    except ValueError:
        factors = {}
    widths = {shape.name: shape.in_features for shape in content.shapes}
    assert all(a.shape == (content.config.r, widths[name]) for name, (a, _) in factors.items())
    assert len(packed.dumps(content)) > 0
    return content


def same(one, other):
    return (
        one.config == other.config
        and (one.shapes, one.base_model, one.init_seed) == (other.shapes, other.base_model, other.init_seed)
        and [*one.tensors, *one.heads] == [*other.tensors, *other.heads]
        and all(torch.equal(t, other.tensors[name]) for name, t in one.tensors.items())
        and all(torch.equal(t, other.heads[name]) for name, t in one.heads.items())
    )


def signed(text, raws):
    """A file of this header and these tensors, with the checksum that is theirs."""
    try:
        return serialize(raws, {packed.HEADER: text, packed.CHECKSUM: checksum(text, raws)})
    except UnicodeEncodeError:  # half a character cannot be written, so it cannot be read
        return b""


# --- Damage -------------------------------------------------------------------------------------------------------


def damage(data, rng):
    """The bytes with something done to them that disks, networks and editors do."""
    changed, at = bytearray(data), rng.randrange(len(data))
    length = rng.randint(1, 40)
    kind = rng.randrange(7)
    if kind == 0:
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        del changed[at : at + length]
    elif kind == 3:
        changed[at:at] = rng.randbytes(length)
    elif kind == 4:
        other = rng.randrange(len(data))
        changed[at : at + 8], changed[other : other + 8] = changed[other : other + 8], changed[at : at + 8]
    elif kind == 5:
        changed[at : at + length] = rng.choice([b"9" * length, b"\0" * length, b"[" * length, b'"' * length])
    else:
        changed[:8] = rng.choice([rng.randrange(2**64), len(data), len(data) - 8, 0]).to_bytes(8, "little")
    return bytes(changed)


@pytest.mark.parametrize("part", range(4))
def test_damaged_files_are_refused_or_unharmed(part, files):
    rng = random.Random(part)
    whole = {name: packed.loads(data) for name, data in files.items()}
    refused = 0
    for round_ in range(700):
        name = rng.choice(list(files))
        content = outcome(damage(files[name], rng))
        assert content is None or same(content, whole[name]), f"round {round_}"
        refused += content is None
    assert refused > 600


# --- Malice: everything wrong but the checksum --------------------------------------------------------------------


def spots(value, path=()):
    """Every place in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from spots(child, (*path, key))


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    if new is KeyError:
        del value[path[-1]]
    else:
        value[path[-1]] = new


def forged_header(header, rng):
    """The header's text with one value replaced, dropped or doubled."""
    path = rng.choice([spot for spot in spots(header) if spot])
    kind = rng.randrange(8)
    if kind == 0:
        put(header, path, KeyError)
    elif kind == 1:
        header[rng.choice(["more", "codes", "config"])] = rng.choice(NASTY)
    elif kind == 2:
        key = rng.choice(list(header))
        return "{" + f'"{key}":0,' + json.dumps(header)[1:]
    elif kind == 3:
        put(header, path, rng.randint(-3, 300))
    elif kind == 4:
        return json.dumps(header).replace(":", rng.choice([":[", ":NaN,", ":1e999,", ":" + "9" * 5000 + ","]), 1)
    else:
        put(header, path, rng.choice(NASTY))
    return json.dumps(header)


def forged_tensors(raws, rng):
    """The tensors with one of another type, shape, length or content, or another name."""
    name = rng.choice(list(raws))
    raw = raws.pop(name)
    data = bytes(raw.data)
    kind = rng.randrange(6)
    if kind == 0:
        data = rng.randbytes(len(data))
    elif kind == 1:
        name = rng.choice(["x", "head.", f"scale.{name}", "topk_indices", ""])
    elif kind == 2:
        raw = raw._replace(dtype="U8", shape=(len(data),))
    elif kind == 3 and data:
        data = data[: rng.randrange(len(data))]
        raw = raw._replace(dtype="U8", shape=(len(data),))
    elif kind == 4:
        at = rng.randrange(len(data))
        data = data[:at] + rng.randbytes(4) + data[at + 4 :]
        raw = raw if len(data) == len(raw.data) else raw._replace(dtype="I8", shape=(len(data), 1))
    else:
        return raws
    raws[name] = raw._replace(data=data)
    return raws


@pytest.mark.parametrize("part", range(4))
def test_forged_files_are_refused_or_whole(part, files):
    rng = random.Random(100 + part)
    refused = 0
    for _ in range(700):
        raws, metadata = deserialize(files[rng.choice(list(files))])
        text = metadata[packed.HEADER]
        if rng.random() < 0.6:
            text = forged_header(json.loads(text), rng)
        if text == metadata[packed.HEADER] or rng.random() < 0.1:
            raws = forged_tensors(raws, rng)
        refused += outcome(signed(text, raws)) is None
    assert refused > 350


# --- Bombs: small files that ask for much ---------------------------------------------------------------------------


def with_header(data, edit=lambda text: text, config=None, **changes):
    """The file with other settings or header, the fingerprint and the checksum those of the changed file."""
    raws, metadata = deserialize(data)
    header = json.loads(metadata[packed.HEADER])
    header["config"] |= config or {}
    codes = header["codes"] | changes.pop("codes", {})
    header |= {"codes": codes, **changes}
    if "layers" in changes and len(header["layers"][0]) == 3:
        name, *widths = header["layers"][0]
        header["fingerprint"] = hashlib.sha256(f"{name}\t{widths[0]}\t{widths[1]}\t0\n".encode()).hexdigest()
    return signed(edit(json.dumps(header)), raws)


def with_shape(data, n):
    """The file, in whose own header the first tensor has this many rows."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["vector_bank"]["shape"] = [n, 8]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def bombs(files):
    """Files that are sound but for the memory or the time that they ask for."""
    plain = files["finer"]
    for n in (10**6, 10**9, 2**40, 10**18, 10**300):
        yield f"{n:.0e} vectors", with_header(plain, config={"num_vectors": n})
        yield f"{n:.0e} long", with_header(plain, config={"vector_length": n})
        yield f"{n:.0e} rank", with_header(plain, config={"r": n})
        yield f"{n:.0e} top", with_header(plain, config={"topk": n, "num_vectors": n})
        yield f"{n:.0e} blocks", with_header(plain, layers=[["layers.", 0, min(n, 10**9 - 1), [[".up", 32, 64]]]])
        yield f"{n:.0e} wide", with_header(plain, layers=[["up", n, n]])
        yield f"{n:.0e} in planes", with_header(files["xs"], codes={"head.classifier.weight": ["F32", n]})
        yield f"{n:.0e} rows", with_shape(plain, n)
    yield "long names", with_header(plain, layers=[["l" * 60000 + ".", 0, 100, [[".up", 8, 8]]]])
    yield "split", with_header(files["tied"], config={"split_modules": {"layers.0": ["up", *map(str, range(300_000))]}})
    yield "nested", with_header(plain, lambda text: text.replace('"version": 1', '"version": ' + "[" * 200_000))
    yield "nested header", (2 * 10**6).to_bytes(8, "little") + b"[" * 2 * 10**6
    yield "doubled", signed('{"version":1,"version":1}', deserialize(plain)[0])
    yield "pattern", with_header(plain, config={"target_modules": "(" * 50_000 + "a{1,4294967295}"})
    yield "pattern to run", with_header(plain, config={"target_modules": "((a|a.b)*)*" * 200})
    raws, metadata = deserialize(files["xs"])
    header = json.loads(metadata[packed.HEADER])
    for said, inflated in ((10**5, 10**5), (10**8, 10**8), (300, 10**5)):
        deflated = inflating_to(inflated)
        planes = b"".join(len(piece).to_bytes(4, "little") + piece for piece in [deflated, *[bytes(said)] * 3])
        if said > 300:
            planes = (len(deflated).to_bytes(4, "little") + deflated) * 4
        header["codes"]["head.classifier.bias"] = ["F32", said]
        raws["head.classifier.bias"] = Raw("U8", (len(planes),), planes)
        yield f"{said:.0e} said, deflated {inflated:.0e}", signed(json.dumps(header), raws)


def inflating_to(size):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = bytes(10**5)
    return b"".join(packer.compress(piece) for _ in range(size // len(piece))) + packer.flush()


CHILD = """
import os, pathlib, resource, sys, time
import torch
from vblora.files import packed

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
packed.loads((folder / "sound").read_bytes()).factors()  # what is imported on the way is
page = os.sysconf("SC_PAGE_SIZE")
size = page * int(pathlib.Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, size + 2**26))
for path in sorted(folder.glob("bomb*")):
    start = time.perf_counter()
    try:
        packed.read(path)
        print("taken", path.name)
    except ValueError:
        pass
    assert time.perf_counter() - start < 5, path.name
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of a process's memory")
def test_bombs_neither_take_memory_nor_hang(files, tmp_path):
    """In a process that gets 64 MiB more than Python and torch take, each is a ValueError."""
    (tmp_path / "sound").write_bytes(files["split"])
    for number, (name, data) in enumerate(bombs(files)):
        (tmp_path / f"bomb {number} {name[:30]}").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # A pattern is not run when a file is read, nor when it is loaded into a model.
    assert "pattern to run" in done.stdout and done.stdout.count("taken") == 1


def test_four_bits_are_for_the_bank_alone():
    """A file of anybody that has something else in them is refused, as the format says."""
    data = packed.dumps(adapt(build("stack"), topk=3), bank="int4")
    raws, metadata = deserialize(data)
    raws, header = dict(raws), json.loads(metadata[packed.HEADER])
    steps, scale = to_whole(torch.rand(len(raws["topk_weights"].tensor()), 2), 4)
    raws["topk_weights"] = Raw.of(pack_bits(steps.cpu() + 8, 4))
    raws["scale.topk_weights"] = Raw.of(scale)
    header["codes"]["topk_weights"] = "int4"
    with pytest.raises(ValueError, match="topk_weights is written in a way that is not known here: 'int4'"):
        packed.loads(signed(json.dumps(header), raws))
