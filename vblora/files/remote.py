"""Adapters on the hub: fetched by name, and uploaded. huggingface_hub is imported when one is asked for."""

from __future__ import annotations

import json
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vblora.files.card import CARD_FILE, HUB_NAME, at, hub_name, is_ours
from vblora.files.directory import CONFIG_FILE, SETTINGS, TENSOR_FILE
from vblora.io import read_json, read_tensors, write_json, write_tensors

PATIENCE = 4.0  # seconds to wait for the hub's first answer
BASE_KEY = "base_model_name_or_path"
UPLOADED = (".json", ".safetensors")  # of a folder, besides its card


# --- Fetching -------------------------------------------------------------------------------------------------------


def local_path(source: str | Path, revision: str | None = None, subfolder: str | None = None) -> Path:
    """Where an adapter lies on this machine: a path, or what is fetched from the hub by a name, "user/name".

    A text that is no path here and has one "/" is a name.

    Raises:
        ValueError: the hub does not give it, or a revision is asked of a path.
    """
    path = Path(source)
    is_name = isinstance(source, str) and source.count("/") == 1 and HUB_NAME.fullmatch(source) is not None
    if path.exists() or not is_name:
        if revision is not None:
            raise ValueError(f"{source} is a path here, and a revision ({revision}) is of a repository on the hub")
        return path / subfolder if subfolder else path
    return _fetched(str(source), revision, subfolder)


def _fetched(name: str, revision: str | None, subfolder: str | None) -> Path:
    """The folder of an adapter in the hub's cache; of the repository only the adapter's two files are fetched."""
    hub = _library(f"{name} is no folder here, and to look for it on the hub")
    inside = "" if subfolder is None else f"{subfolder.strip('/')}/"
    with _one_sentence(name, revision):
        folder = hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=[f"{inside}{file}" for file in (CONFIG_FILE, TENSOR_FILE)],
            local_files_only=not in_reach(),
        )
    found = Path(folder) / inside
    if not (found / TENSOR_FILE).exists():
        where = f"in {subfolder} of {name}" if subfolder else f"in {name}"
        raise ValueError(f"there is no adapter {where} on the hub: it has no {TENSOR_FILE} (subfolder= says where)")
    return found


def in_reach() -> bool:
    """Whether anything answers at the hub's address; an error page is an answer too."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


# --- Uploading ------------------------------------------------------------------------------------------------------


def push(
    adapter: Any,
    repository: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    form: str = "topk",
    format: str = "auto",
) -> str:
    """Upload an adapter to a repository of the hub, in one commit.

    Args:
        adapter: an attached one.
        repository: its name there, "user/name"; made if missing.
        revision: the branch, made if missing; the main one unless given.
        subfolder: where in the repository; its root unless given.
        private: whether a repository that is made is private; the hub's own default unless given.
        token: the hub's; the one that huggingface_hub knows unless given.
        commit_message: of the commit.
        form, format: as `Adapter.save` takes them.

    Returns:
        The commit's address.

    Raises:
        ValueError: the adapter cannot be saved so, or the hub does not take it.
    """
    with tempfile.TemporaryDirectory() as made:
        adapter.save(made, form=form, format=format)
        return upload(
            Path(made),
            repository,
            revision=revision,
            subfolder=subfolder,
            private=private,
            token=token,
            commit_message=commit_message,
        )


def upload(
    folder: Path,
    repository: str,
    *,
    more: Mapping[str, Path] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload the JSON files, the tensors and the card of a folder, and `more` files by their names, in one commit.

    What is uploaded names no folder of this machine as its base model; a card in the repository that somebody else
    wrote is left as it is. Returns the commit's address; the other arguments are those of `push`.

    Raises:
        ValueError: the hub does not take them.
    """
    hub = _library("to upload an adapter")
    check_name(repository)
    with tempfile.TemporaryDirectory() as made, _one_sentence(repository, revision):
        stage = Path(made)
        _copy(folder, stage, more or {})
        _leave_out_paths(stage)
        api = hub.HfApi(token=token)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id  # with its owner
        _name_place(stage, repository, revision, subfolder)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if _has_foreign_card(api, repository, revision, subfolder):
            (stage / CARD_FILE).unlink(missing_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=stage,
            path_in_repo=subfolder,
            revision=revision,
            commit_message=commit_message or "Upload an adapter with vblora",
        )
    return str(commit.commit_url)


def check_name(repository: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        ValueError: saying what one is.
    """
    if not isinstance(repository, str) or repository.count("/") > 1 or not HUB_NAME.fullmatch(repository):
        raise ValueError(f'{repository!r} is no name of a repository on the hub, which is "user/name"')


def check_token(token: str | None) -> None:
    """Refuse a token that the hub does not know, or none at all.

    Raises:
        ValueError: saying so.
    """
    with _one_sentence("the token", None):
        _library("to upload an adapter").HfApi(token=token).whoami()


def _copy(folder: Path, stage: Path, more: Mapping[str, Path]) -> None:
    chosen = {p.name: p for p in sorted(folder.iterdir()) if p.suffix in UPLOADED or p.name == CARD_FILE}
    for name, path in {**chosen, **more}.items():
        shutil.copyfile(path, stage / name)


def _name_place(stage: Path, repository: str, revision: str | None, subfolder: str | None) -> None:
    """Let the code in our card load the adapter from where it will be."""
    card = stage / CARD_FILE
    if card.exists() and is_ours(card.read_bytes()):
        card.write_text(at(card.read_text(encoding="utf-8"), repository, revision, subfolder), encoding="utf-8")


def _leave_out_paths(stage: Path) -> None:
    """Forget a base model that is a folder of this machine, which tells others nothing."""
    config, tensors, card = stage / CONFIG_FILE, stage / TENSOR_FILE, stage / CARD_FILE
    if config.exists():
        settings = read_json(config)
        write_json(config, cleared := _without_path(settings))
        if cleared != settings and card.exists():  # PEFT's names it
            text, base = card.read_text(encoding="utf-8"), settings[BASE_KEY]
            card.write_text(text.replace(base, Path(base).name), encoding="utf-8")
    if tensors.exists():
        values, metadata = read_tensors(tensors)
        if SETTINGS in metadata:
            settings = _without_path(json.loads(metadata[SETTINGS]))
            metadata[SETTINGS] = json.dumps({k: v for k, v in settings.items() if v is not None}, sort_keys=True)
            write_tensors(tensors, values, metadata)


def _without_path(settings: dict[str, Any]) -> dict[str, Any]:
    base = settings.get(BASE_KEY)
    return {**settings, BASE_KEY: hub_name(base)} if isinstance(base, str) else settings


def _has_foreign_card(api: Any, repository: str, revision: str | None, subfolder: str | None) -> bool:
    name = f"{subfolder.strip('/')}/{CARD_FILE}" if subfolder else CARD_FILE
    if not api.file_exists(repository, name, revision=revision):
        return False
    return not is_ours(Path(api.hf_hub_download(repository, name, revision=revision)).read_bytes())


# --- What the hub says ----------------------------------------------------------------------------------------------


def _library(what: str) -> Any:
    """huggingface_hub.

    Raises:
        ValueError: it is missing; the message begins with what it is for.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"{what} takes huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


@contextmanager
def _one_sentence(name: str, revision: str | None) -> Iterator[None]:
    """Say in one sentence why the hub did not do what was asked of it."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(f"{name} is gated on the hub: ask for access on its page, and give a token") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} is no folder here, and on the hub there is none, or it is private and the token (HF_TOKEN, or "
            "`hf auth login`) is missing or not allowed to see it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{name} has no revision {revision!r} on the hub") from error
    except errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} is no folder here, and the hub cannot be reached and its cache has no copy"
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise ValueError("the hub asks for a token, and there is none: set HF_TOKEN, or `hf auth login`") from error
    except errors.HfHubHTTPError as error:
        raise ValueError(f"{name}: the hub answered: {_first_line(error)}") from error
    except _network_errors() as error:
        raise ValueError(f"{name}: the hub cannot be reached ({type(error).__name__})") from error


def _first_line(error: Any) -> str:
    return str(error.server_message or error).strip().split("\n")[0]


def _network_errors() -> tuple[type[Exception], ...]:
    """What the library's own errors are derived from, whichever client it sends requests with."""
    from huggingface_hub.errors import HfHubHTTPError

    return (next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"), ConnectionError)
