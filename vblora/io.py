"""Reading and writing tensors and JSON: whole files or nothing, and never a pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from vblora import container


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _read_umask()  # once, at import: reading it means changing it for a moment, for all threads
MOST_JSON_BYTES = 2**28  # looked at before a file is read into memory


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in place of what was there, in one step; the same bytes for the same content.

    Raises:
        ValueError: a tensor of a type that is not written here.
        OSError: it cannot be written, as on a full disk; what was there stays.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        container.write(file, tensors, {"format": "pt", **metadata})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata.

    Raises:
        ValueError: no such file, or it is cut short or damaged.
    """
    with container.opened(path) as file:
        return file.tensors(), file.metadata


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in place of what was there, in one step."""
    text = json_text(path, value)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(path: Path, value: Any) -> str:
    """What `write_json` writes.

    Raises:
        ValueError: a number is NaN or infinite; the message names the file.
    """
    try:
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as error:  # other programs refuse NaN and Infinity, which are no JSON
        raise ValueError(f"{path} is not written: a number in it is NaN or infinite ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: no such file, no JSON, or no object.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {MOST_JSON_BYTES} read as JSON")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


# --- In one step ----------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved over it when the block ends well and removed when it does not.

    After the block the file is on the disk, not only in memory. What killed processes left of earlier blocks with this
    path is removed.

    Raises:
        ValueError: the folder is a file.
        OSError: it cannot be written, as on a full disk or in a read-only folder. Nothing is left then.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path  # the link stays, its target is replaced
    with _in_folder(path.parent):
        temporary, handle = _temporary_file(path)
        try:
            _sweep(path)
            yield temporary
            # A file that was private stays so.
            temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~UMASK)
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(handle)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path`, renamed to it when the block ends well and removed when it does not.

    Raises:
        ValueError: `path` exists and is no empty directory.
        OSError: as in `replacing`.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists: remove it, or name another folder")
    with _in_folder(path.parent):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=TEMPORARY))
        handle = os.open(temporary, os.O_RDONLY)
        _lock(handle)
        try:
            _sweep(path)
            yield temporary
            temporary.chmod(0o777 & ~UMASK)
            for made in temporary.rglob("*"):
                _flush(made)
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(handle)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Made if missing; within this block no other process, and no other thread, is in such a block of this folder.

    Where a file system knows no such locks it is nobody's.
    """
    with _in_folder(folder):
        try:
            handle = os.open(folder, os.O_RDONLY)
        except OSError:  # Windows opens no folders
            yield
            return
        try:
            _lock(handle, wait=True)
            yield
        finally:
            _unlock(handle)
            os.close(handle)


@contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Within it others write: torch, safetensors and tokenizers, which on a full disk raise errors of their own.

    Raises:
        OSError: in the place of these, naming what was to be written.
    """
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if not UNWRITTEN.search(text):
            raise
        raise OSError(f"{what} cannot be written: is the disk full, or the folder read-only? ({text:.200})") from error


# PyTorch's zip files and its streams; what Rust says, of safetensors and tokenizers.
UNWRITTEN = re.compile(r"PytorchStreamWriter|inline_container|iostream|os error \d+|No space left", re.IGNORECASE)


def is_being_replaced(path: Path) -> bool:
    """Whether a block of `replacing` with this path is under way, or was ended by a kill."""
    path = Path(os.path.realpath(path))
    return any(True for _ in _remains(path))


TEMPORARY = ".tmp"
LONGEST_STEM = 100  # bytes of a name that its temporary files repeat: a name has 255 at most


def _prefix(path: Path) -> str:
    """How the names of temporary files for this path begin."""
    name = os.fsencode(path.name)
    stem = path.name if len(name) <= LONGEST_STEM else hashlib.sha256(name).hexdigest()[:32]
    return f".{stem}."


def _temporary_file(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, and a handle that has it locked as long as this process lives."""
    while True:
        try:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=TEMPORARY)
        except OSError as error:  # which would name a file that nobody knows
            raise OSError(error.errno, error.strerror, str(path)) from error
        _lock(handle)
        if os.path.exists(name):
            return Path(name), handle
        os.close(handle)  # swept by another process in the moment before it was locked


def _remains(path: Path) -> Iterator[Path]:
    """The temporary files and folders for this path, of living and of killed processes."""
    name = re.compile(rf"{re.escape(_prefix(path))}[a-z0-9_]{{8}}{re.escape(TEMPORARY)}")
    with suppress(OSError):
        yield from [path.parent / found for found in os.listdir(path.parent) if name.fullmatch(found)]


def _sweep(path: Path) -> None:
    """Remove the temporary files for this path that no living process has locked."""
    for found in _remains(path):
        with suppress(OSError):
            handle = os.open(found, os.O_RDONLY)
            try:
                if _lock(handle):
                    shutil.rmtree(found) if found.is_dir() else found.unlink()
            finally:
                os.close(handle)


def _lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file or folder for this process; whether that was possible."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (ImportError, OSError):  # Windows; another's; or a file system without locks
        return False
    return True


def _unlock(handle: int) -> None:
    """Unlock it also for processes that were forked meanwhile, which closing it here would not."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)


@contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    """Make a folder with those above it; where the block fails, take away again what has been made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a folder is to be written there: name another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # not empty: another process writes there, too
                path.rmdir()
        raise


def _flush(path: Path) -> None:
    """Have what was written into a file, or the names in a folder, on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system that cannot do it
            raise
    finally:
        os.close(handle)


# --- Descriptions ---------------------------------------------------------------------------------------------------


def describe_dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over a folder's configuration and weights, or over a packed adapter's file."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        if path.suffix in (".json", ".safetensors", ".bin", ".gguf"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()
