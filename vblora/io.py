"""Reading and writing tensors and JSON: whole files or nothing, and never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


UMASK = _read_umask()  # once, at import: reading it means changing it for a moment, for all threads


MOST_JSON_BYTES = 2**28  # looked at before a file is read into memory


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in place of what was there, in one step."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Copies, as heads may share a weight with each other, which safetensors refuses.
    ready = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(ready, temporary, metadata={"format": "pt", **metadata})
        except SafetensorError as error:  # a full disk, among others
            raise OSError(f"{path} could not be written: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata.

    Raises:
        ValueError: no such file, or it is cut short or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors; errors as in `read_tensors`."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in place of what was there, in one step."""
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as error:  # other programs refuse NaN and Infinity, which are no JSON
        raise ValueError(f"{path} is not written: a number in it is NaN or infinite ({error})") from error
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved over it when the block ends well and removed when it does not."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path  # the link stays, its target is replaced
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"{path.parent} is a file, and a folder is to be written there: name another one")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # A file that was private stays so.
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~UMASK)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path`, renamed to it when the block ends well and removed when it does not.

    Raises:
        ValueError: `path` exists and is no empty directory.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists: remove it, or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o777 & ~UMASK)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
