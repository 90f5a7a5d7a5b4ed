"""Models of the Hugging Face hub: what transformers would read is downloaded, and nothing else."""

from collections.abc import Callable
from pathlib import Path

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.description import INDEX, read_index

_SMALL = (  # configurations, tokenizers, licences
    "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "vocab.*", "LICEN[CS]E*", "NOTICE*", "COPYING*",
    "USE_POLICY*", "USAGE_POLICY*",
)  # fmt: skip
_TEMPLATES = ("additional_chat_templates/*", "config.json")  # which is there, so that something is
_FOLDERS = "*/*"  # patterns match across folders: onnx/ and original/ hold the weights once more


def described(path: str, check: Callable[[Path], object]) -> Path:
    """The snapshot of a hub id, or id@revision, as far as ``config.json``, which ``check`` sees.

    Its name is the commit that the revision, or the main branch, is at now. `UserError` for what cannot be downloaded.
    """
    name, _, revision = path.partition("@")
    folder = _fetch(path, name, revision or None, allow_patterns=["config.json"])
    check(folder)
    return folder


def download(path: str, check: Callable[[Path], object], code: bool) -> Path:
    """The snapshot of a hub id, or id@revision; ``check`` sees its ``config.json`` before weights are downloaded.

    ``code``: with the Python files that come with the model. `UserError` for what cannot be downloaded.
    """
    folder = described(path, check)
    name, commit = path.partition("@")[0], folder.name  # the branch may move meanwhile
    patterns = [*_SMALL, *(["*.py"] if code else []), "model.safetensors"]
    _fetch(path, name, commit, allow_patterns=patterns, ignore_patterns=[_FOLDERS])
    _fetch(path, name, commit, allow_patterns=[*_TEMPLATES])
    if not (folder / "model.safetensors").is_file() and (folder / INDEX).is_file():
        _fetch(path, name, commit, allow_patterns=sorted(set(read_index(folder).values())))
    return folder


def name_and_commit(folder: Path) -> tuple[str | None, str | None]:
    """Of a snapshot in the hub's cache, ``models--ORGANISATION--NAME/snapshots/COMMIT``; None of another folder."""
    snapshot = folder.resolve()
    kind, _, name = snapshot.parent.parent.name.partition("--")
    if snapshot.parent.name != "snapshots" or kind != "models":
        return None, None
    return name.replace("--", "/", 1), snapshot.name


def _fetch(path: str, name: str, revision: str | None, **patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RevisionNotFoundError

    fetch: Callable[..., str] = snapshot_download
    asked = {"revision": revision} if revision else {}
    elsewhere = "or download it elsewhere and give the folder"
    try:
        return Path(fetch(name, **asked, **patterns))
    except GatedRepoError as error:
        raise UserError(
            f"model.path {path!r} is gated: accept the terms on its page, then log in (hf auth login, or HF_TOKEN),"
            f" {elsewhere}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"model.path {path!r}: {name} has no revision {revision}; name a branch, a tag or a whole commit"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"model.path {path!r} is not in the hub's cache, or not whole, and the hub cannot be reached; unset"
            f" HF_HUB_OFFLINE, {elsewhere}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path {path!r} is neither a folder nor a hub model that can be downloaded ({type(error).__name__});"
            f" write it as organisation/name or organisation/name@revision, log in for a private model, {elsewhere}"
        ) from error
