"""Models of the Hugging Face hub: what transformers would read is downloaded, and nothing else."""

from collections.abc import Callable
from pathlib import Path

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.description import INDEX, read_index

_SMALL = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")  # configurations and tokenizers
_FOLDERS = "*/*"  # patterns match across folders: onnx/ and original/ hold the weights once more


def download(path: str, check: Callable[[Path], object], code: bool) -> Path:
    """The snapshot of a hub id, or id@revision; ``check`` sees its ``config.json`` before weights are downloaded.

    ``code``: with the Python files that come with the model. `UserError` for what cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    fetch: Callable[..., str] = snapshot_download
    name, _, revision = path.partition("@")
    try:
        asked = {"revision": revision} if revision else {}
        folder = Path(fetch(name, allow_patterns=["config.json"], **asked))
        check(folder)
        pinned = {"revision": folder.name}  # the branch may move meanwhile
        patterns = [*_SMALL, *(["*.py"] if code else []), "model.safetensors"]
        fetch(name, allow_patterns=patterns, ignore_patterns=[_FOLDERS], **pinned)
        if not (folder / "model.safetensors").is_file() and (folder / INDEX).is_file():
            fetch(name, allow_patterns=sorted(set(read_index(folder).values())), **pinned)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path {path!r} is neither a folder nor a hub model that can be downloaded ({type(error).__name__});"
            " write it as organisation/name or organisation/name@revision, log in for a gated model, or download it"
            " elsewhere and give the folder"
        ) from error
    return folder
