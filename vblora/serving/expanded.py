"""Packed adapters by name, expanded into directories of plain LoRA when they are asked for.

    found = Expanded(PackedFolder("adapters/"), Cache(Path("cache"), Limit.of("10GB"))).find("alice", "some/model")

What is asked for comes from outside, and so may the files: a name never leaves the folder, and a file that is broken,
too large or made for another model is refused with a ValueError. `vblora.serving.vllm_resolver` stands on this.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vblora.container import deserialize
from vblora.files import match, packed, shared_bank
from vblora.files.content import Content
from vblora.files.lora import export

# NAME.vblora.safetensors comes before NAME.safetensors.
SUFFIXES = (".vblora.safetensors", ".safetensors")
NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
ENTRY = re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{32}")  # a directory of the cache; nothing else in it is touched
REMAINS = re.compile(rf"\.{ENTRY.pattern}(\..*)?")  # one that was being written or removed
LAYOUT = b"vblora lora 1\n"  # changes when the same file would be expanded into something else
MOST_REFUSED = 10_000  # files whose refusal is remembered
UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Expanded:
    """Packed adapters of a folder, and the cache they are expanded into.

    Args:
        adapters: where the packed files are.
        cache: where the directories of plain LoRA go.
        bases: names that stand for the served model besides its own, as where it is served from a folder.
    """

    def __init__(self, adapters: PackedFolder, cache: Cache, bases: frozenset[str] = frozenset()) -> None:
        self.adapters = adapters
        self.cache = cache
        self.bases = bases
        self._models: dict[str, nn.Module | None] = {}  # served models without weights, by name
        self._refused: OrderedDict[tuple[str, str], tuple[Any, str]] = OrderedDict()  # by name and served model

    def find(self, name: str, base_model: str) -> Path | None:
        """The directory of plain LoRA of the adapter with this name; None where there is none.

        Raises:
            ValueError: there is a file of this name that cannot be served; the message says why.
            OSError: it cannot be read, or the cache not be written to.
        """
        stamp = self.adapters.stamp(name)
        if stamp is None:
            return None
        before, reason = self._refused.get((name, base_model), (None, ""))
        if before == stamp:
            raise ValueError(f"{reason} (the file has not changed since it was refused)")
        data = self.adapters.read(name)
        if data is None:
            return None
        try:
            content = packed.loads(data, self.adapters.bank)
            self._check_fit(name, content, base_model)
            return self.cache.directory(name, data, content)
        except OfAnotherFile:
            raise
        except ValueError as error:
            self._refused[name, base_model] = (stamp, str(error))
            while len(self._refused) > MOST_REFUSED:
                self._refused.popitem(last=False)
            raise

    def _is_served(self, wanted: str, served: str) -> bool:
        if wanted == served or wanted in self.bases:
            return True
        return os.path.isdir(served) and os.path.realpath(wanted) == os.path.realpath(served)

    def _check_fit(self, name: str, content: Content, base_model: str) -> None:
        """Refuse an adapter for another model, or for other layers. vLLM takes one whose layers are narrower, or called
        otherwise, and gives other outputs without a word."""
        if content.base_model is not None and not self._is_served(content.base_model, base_model):
            raise ValueError(f"it was made for {content.base_model!r}, and {base_model!r} is served")
        if base_model not in self._models:
            self._models[base_model] = _empty_model(base_model)
        model = self._models[base_model]
        if content.config.target_parameters:
            _check_experts(content, model)
        if model is not None:
            match.find_layers(model, content, Path(name))


def _check_experts(content: Content, model: nn.Module | None) -> None:
    """Refuse experts that vLLM 0.33 would not take in this layout: of a model of two-dimensional experts it asks for a
    flag with each request, of Mixtral it looks for another name, and of a module with one parameter it ends."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != "gpt_oss":
        raise ValueError("it adapts experts, which are served by this way for GPT-OSS alone: see docs/serving.md")
    adapted = {shape.name.rsplit(".", 2)[1] for shape in content.shapes if shape.name.rpartition(".")[2].isdecimal()}
    if not {"gate_up_proj", "down_proj"} <= adapted:
        raise ValueError("it adapts one of gate_up_proj and down_proj, and vLLM takes experts with both alone")


def _empty_model(name: str) -> nn.Module | None:
    """The model of this name, or in this folder, without weights; None where transformers knows no such model.

    Of a model on the hub the server has the settings on disk already: nothing is asked for over the network.
    """
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True)
        of_name = [getattr(transformers, n) for n in config.architectures or [] if hasattr(transformers, n)]
        make = of_name[0]._from_config if of_name else transformers.AutoModel.from_config
        with torch.device("meta"):
            return make(config)
    except Exception:  # no transformers, no such model there, or one whose own code cannot do without weights
        return None


class OfAnotherFile(ValueError):
    """What is wrong may change without the adapter's own file."""


# --- Where packed files are ----------------------------------------------------------------------------------------


class PackedFolder:
    """NAME.vblora.safetensors, or NAME.safetensors, in a folder or under a URL that fsspec reads.

    Raises:
        ValueError: no such folder, or fsspec cannot read such a URL.
    """

    def __init__(self, place: str | Path) -> None:
        self._system: Any = None
        self._root = str(place)
        if "://" in self._root:
            self._system, self._root = _file_system(self._root)
        if self._system is None and not Path(self._root).is_dir():
            raise ValueError(f"{self._root}: no such folder of adapters")

    def read(self, name: str) -> bytes | None:
        """The bytes of the file of this name, None where there is none or the name is no name.

        Raises:
            ValueError: what is there is no file, lies outside of the folder, or is too large.
            OSError: it cannot be read.
        """
        if NAME.fullmatch(name) is None:
            return None
        for suffix in SUFFIXES:
            data = self._read(name + suffix)
            if data is not None:
                return data
        return None

    def stamp(self, name: str) -> Any:
        """What changes when the file of this name is replaced; None where there is none or the name is no name."""
        if NAME.fullmatch(name) is None:
            return None
        found = (self._stamp(name + suffix) for suffix in SUFFIXES)
        return next((stamp for stamp in found if stamp is not None), None)

    def _stamp(self, file: str) -> Any:
        if self._system is not None:
            path = f"{self._root.rstrip('/')}/{file}"
            try:
                return sorted((key, str(value)) for key, value in self._system.info(path).items())
            except FileNotFoundError:
                return None
        found = []
        for look in (os.lstat, os.stat):  # a link, and what it leads to
            with suppress(FileNotFoundError):
                status = look(Path(self._root) / file)
                found.append((file, status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
        return found or None

    def bank(self, key: str) -> Tensor:
        """The shared bank with this key, from its file in the folder.

        Raises:
            ValueError: there is none, or it is another one; or as `read`.
        """
        file = shared_bank.file_of(key)
        try:
            data = self._read(file)
            if data is None:
                raise ValueError(f"{file}, the bank that it shares with others, is not there")
            tensors = {name: raw.tensor() for name, raw in deserialize(data)[0].items()}
            return shared_bank.checked(tensors, key, file)
        except ValueError as error:
            raise OfAnotherFile(str(error)) from error

    def _read(self, file: str) -> bytes | None:
        return self._read_local(file) if self._system is None else self._read_remote(file)

    def _read_local(self, file: str) -> bytes | None:
        root = Path(self._root).resolve()
        path = root / file
        if not os.path.lexists(path):
            return None
        found = Path(os.path.realpath(path))
        if not found.is_relative_to(root):
            raise ValueError(f"{file} is a link out of the folder")
        if not found.is_file():  # a pipe, read, would never end
            raise ValueError(f"{file} is no file")
        packed.check_size(found.stat().st_size, packed.MOST_BYTES)
        return found.read_bytes()

    def _read_remote(self, file: str) -> bytes | None:
        path = f"{self._root.rstrip('/')}/{file}"
        try:
            packed.check_size(self._system.size(path) or 0, packed.MOST_BYTES)
            return self._system.cat_file(path)
        except FileNotFoundError:
            return None


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it; None and a path for a local one."""
    try:
        import fsspec
    except ImportError as error:
        raise ValueError(f"{url}: adapters under a URL need fsspec: pip install fsspec") from error
    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url}: {error}") from error
    return (None if "file" in system.protocol else system), root


# --- Where they are expanded ---------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """How much a cache may hold: so many adapters, or so many bytes."""

    adapters: int | None
    bytes: int | None

    @classmethod
    def of(cls, text: str) -> Limit:
        """From "200", a number of adapters, or "500MB", "10GB", bytes.

        Raises:
            ValueError: neither, or nothing at all.
        """
        found = re.fullmatch(r"(\d+) ?(kB|MB|GB|TB)?", text.strip())
        if found is None or int(found[1]) == 0:
            raise ValueError(f"it is a number of adapters, or bytes such as 10GB, not {text!r}")
        return cls(None, int(found[1]) * UNITS[found[2]]) if found[2] else cls(int(found[1]), None)


class Cache:
    """Directories of plain LoRA, the least recently used of which go when there is no room.

    One folder serves several processes: whoever makes or takes room in it holds `.lock`, and a directory appears whole,
    by renaming. It is written under a lock of its own, so that one that takes long keeps no other waiting.
    A directory's name is the adapter's with a hash of the packed file: a new file of the old name is a new adapter.

    A directory that a running process has been given is never removed. vLLM asks for an adapter once, and from then on
    goes to its directory whenever the adapter has fallen out of vLLM's own memory; not finding it would end the engine.
    So each process keeps a list of what it was given in `.users`, locked as long as it lives; with the bytes of those
    that are being written, for which there must be room.
    """

    def __init__(self, folder: Path, limit: Limit) -> None:
        self.folder = folder
        self.limit = limit
        self._list: int | None = None  # this process's list, open and locked
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for part in (".users", ".locks"):
            (folder / part).mkdir(exist_ok=True, mode=0o700)

    def directory(self, name: str, data: bytes, content: Content) -> Path:
        """The adapter expanded, now or before; it stays until this process ends.

        Raises:
            ValueError: it cannot be expanded, or there is no room for it.
        """
        path = self.folder / f"{name}-{hashlib.sha256(LAYOUT + data).hexdigest()[:32]}"
        with self._alone(path.name):
            with self._locked():
                there = path.is_dir()
                if there:
                    self._hold(path.name, 0)
            if not there:
                self._write(path, content)
            now = time.time_ns()  # the file system's own clock may stand still for some milliseconds
            os.utime(path, ns=(now, now))
        return path

    def _write(self, path: Path, content: Content) -> None:
        """Expand an adapter; other entries may be written meanwhile."""
        factors = content.factors()  # before it is given room
        with self._locked():
            self._remove_remains()
            self._make_room(content)
            self._hold(path.name, _expanded_bytes(content))
        try:
            export(content, path, factors)
        except BaseException:
            with self._locked():
                self._hold(path.name, 0)
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One expansion of this entry at a time; its lock's file goes with the last."""
        path = self.folder / ".locks" / name
        while True:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if _leads_to(path, handle):  # else removed by whoever had it, so that another may be there by now
                    try:
                        yield
                    finally:
                        path.unlink(missing_ok=True)
                    return
            finally:
                os.close(handle)  # whatever happens: others wait for it

    def _entries(self) -> list[Path]:
        """All directories, least recently used first."""
        return sorted(
            (path for path in self.folder.iterdir() if ENTRY.fullmatch(path.name) and path.is_dir()),
            key=lambda path: path.stat().st_mtime_ns,
        )

    def _remove_remains(self) -> None:
        """What a process left that ended while it was writing, when its lock went, or removing, under `.lock`."""
        for path in self.folder.iterdir():
            if REMAINS.fullmatch(path.name):
                with suppress(OSError):
                    handle = os.open(path, os.O_RDONLY)
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(path, ignore_errors=True)
                    finally:
                        os.close(handle)

    def _make_room(self, content: Content) -> None:
        """Remove directories that nobody has, until another one fits."""
        needed = _expanded_bytes(content)
        if self.limit.bytes is not None and needed > self.limit.bytes:
            raise ValueError(f"expanded it takes {needed:,} bytes, and the cache may have {self.limit.bytes:,}")
        entries = self._entries()
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in entries}
        in_use = self._in_use()
        free = [path for path in entries if path.name not in in_use]
        sizes |= {self.folder / name: size for name, size in in_use.items() if size and self.folder / name not in sizes}
        while self._is_full(sizes, needed):
            if not free:
                raise OfAnotherFile(
                    f"the cache is full of {len(sizes)} adapters that running servers use: allow it more"
                )
            path = free.pop(0)
            del sizes[path]
            shutil.rmtree(path.rename(self.folder / f".{path.name}"))  # in one step no entry any more

    def _is_full(self, sizes: dict[Path, int], needed: int) -> bool:
        if self.limit.adapters is not None:
            return len(sizes) >= self.limit.adapters
        assert self.limit.bytes is not None
        return sum(sizes.values()) + needed > self.limit.bytes

    def _in_use(self) -> dict[str, int]:
        """The directories that running processes were given, and what those take that are being written; the lists of
        others are removed."""
        names: dict[str, int] = {}
        for path in (self.folder / ".users").iterdir():
            handle = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()  # nobody holds it
            except BlockingIOError:
                for line in path.read_text(encoding="utf-8").split():
                    name, _, size = line.partition(":")
                    names[name] = int(size or 0)
            finally:
                os.close(handle)
        return names

    def _hold(self, name: str, size: int) -> None:
        if self._list is None:
            path = self.folder / ".users" / f"{os.getpid()}-{uuid.uuid4().hex}"
            self._list = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND, 0o600)
            fcntl.flock(self._list, fcntl.LOCK_EX)
        os.write(self._list, f"{name}:{size}\n".encode())

    def __del__(self) -> None:
        if getattr(self, "_list", None) is not None:
            with suppress(OSError):
                os.close(self._list)  # type: ignore[arg-type]


def _leads_to(path: Path, handle: int) -> bool:
    """Whether this open file is still what is at the path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _expanded_bytes(content: Content) -> int:
    """About what a directory will take, and not less: factors, heads, and names."""
    heads = sum(t.numel() * t.element_size() for t in content.heads.values())
    parts = max([len(p) for p in (content.config.split_modules or {}).values()], default=1)
    return content.factor_bytes * parts + heads + 2**12 + 512 * len(content.shapes)
