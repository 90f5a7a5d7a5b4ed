"""Documents in local files: UTF-8 text, or a column of records (JSON, JSON lines, CSV, TSV, Parquet)."""

import filecmp
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxmoe_steps.errors import UserError

Document = str | list[dict[str, Any]]  # a text, or the messages of a chat

_CONTAINERS = {  # first bytes of what is no text -> its name
    b"\x1f\x8b": "a gzip file; unpack it",
    b"PK\x03\x04": "a zip file; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it",
    b"%PDF": "a PDF file; convert it to text",
    b"PAR1": "a Parquet file; let its name end in .parquet, and name its `column`",
    b"\xff\xfe": "UTF-16; convert it, e.g. iconv -f utf-16 -t utf-8",
    b"\xfe\xff": "UTF-16; convert it, e.g. iconv -f utf-16 -t utf-8",
}
_CONTROL = re.compile("[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell what is no character
_CONTROLS_ALLOWED = 0.01  # of characters; more is not text
_UNREADABLE = (OSError, ValueError, RuntimeError, LookupError, MemoryError)  # what json and pyarrow raise
_INSPECTED = 1 << 20  # characters of a document
_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # ShareGPT's names of roles


def read_files(files: Sequence[str], separator: str | None, column: str | None) -> list[Document]:
    """Documents of files in their order; ``separator`` and ``column`` as in `sources.FileText`.

    `UserError` names the file that cannot be read, is not text, or holds records of which no column is named.
    """
    found: list[Document] = []
    for file in files:
        if not Path(file).is_file():  # a pipe that nobody writes to would block for ever
            raise UserError(f"{file}: cannot be read (no such regular file); correct the path in `files`")
        read = _RECORDS.get(Path(file).suffix.lower())
        if column is not None:
            found += _column((read or _read_json)(file), column, file)
        elif read is not None:
            raise UserError(f"{file}: holds records, not text: {_naming(read(file))}")
        else:
            text = _read_text(file)
            if _is_json_records(text):
                raise UserError(f"{file}: holds records, not text: {_naming(_read_json(file))}")
            found += _divided(text, separator)
    return found


def check_apart(files: Sequence[str], test_files: Sequence[str]) -> None:
    """`UserError` for a file that is listed twice, or a copy of another: calibration text must not be evaluated."""
    sizes: dict[int, list[str]] = {}
    for file in (*files, *test_files):
        if Path(file).is_file():
            sizes.setdefault(Path(file).stat().st_size, []).append(file)
    for size, alike in sizes.items():
        for one, two in itertools.combinations(alike if size else [], 2):
            if filecmp.cmp(one, two, shallow=False):
                raise UserError(f"{one} and {two} are the same text; list it once, in `files` or in `test_files`")


def check_text(text: str, where: str) -> None:
    """`UserError` for what is decoded bytes rather than text."""
    if "\0" in text:
        raise UserError(f"{where}: holds a NUL byte at character {text.index(chr(0))}; it is no text, convert it")
    if _SURROGATE.search(text):
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character; convert it")
    piece = text[:_INSPECTED]
    controls = len(_CONTROL.findall(piece))
    if controls > _CONTROLS_ALLOWED * len(piece):
        raise UserError(
            f"{where}: {controls:,} of {len(piece):,} characters are control or replacement characters; it is no text,"
            " convert it"
        )


def as_document(value: Any, where: str) -> Document:
    """A record's value; `UserError` unless it is a text or a chat."""
    if isinstance(value, str):
        check_text(value, where)
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return [_message(turn, where) for turn in value]
    raise UserError(f"{where} is not text, and no list of chat messages either; name another `column`")


def _message(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """A chat message with ``role`` and ``content``, also from ShareGPT's ``from`` and ``value``."""
    given = {key: value for key, value in turn.items() if value is not None}
    if "from" in given and "value" in given:
        given = {"role": given["from"], "content": given["value"]}
    if not isinstance(given.get("role"), str) or not isinstance(given.get("content", ""), str):
        raise UserError(
            f"{where}: a chat message needs role and content, both text; it has {', '.join(map(str, turn))}"
        )
    given["role"] = _SPEAKERS.get(given["role"], given["role"])
    check_text(given.get("content", ""), where)
    return given


def _divided(text: str, separator: str | None) -> list[str]:
    if separator is None:
        return [text]
    texts = []
    block: list[str] = []
    for line in [*text.split("\n"), separator]:
        if line == separator:
            texts.append("\n".join(block))
            block = []
        else:
            block.append(line)
    return texts


def _read_text(file: str) -> str:
    try:
        with Path(file).open("rb") as stream:
            start = stream.read(4)
        for magic, kind in _CONTAINERS.items():
            if start.startswith(magic):
                raise UserError(f"{file}: is {kind}")
        text = Path(file).read_text(encoding="utf-8-sig")  # universal newlines, no byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 at byte {error.start}; convert it, e.g. iconv -f latin1 -t utf-8 {file}"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); correct the path in `files`") from None
    if not text.strip():
        raise UserError(f"{file}: the text file is empty; remove it from `files` or put text in it")
    check_text(text, file)
    return text


@dataclass(frozen=True)
class Records:
    """The columns of a file, and how to get the values of one."""

    columns: list[str]
    values: Callable[[str], list[Any]]


def _naming(records: Records) -> str:
    """What to do about records of which no column is named."""
    likely = [name for name in ("text", "messages", "conversations", "content") if name in records.columns]
    best = [*likely, *records.columns][0]
    return f"name the column to read, e.g. `column: {best}` (there are {', '.join(records.columns)})"


def _column(records: Records, column: str, file: str) -> list[Document]:
    if column not in records.columns:
        raise UserError(f"{file}: no column {column!r}; it has {', '.join(records.columns)}")
    try:
        values = records.values(column)
    except _UNREADABLE as error:
        raise UserError(f"{file}: column {column!r} cannot be read ({error})") from None
    where = f"{file}: column {column!r} of record"
    return [as_document(value, f"{where} {n}") for n, value in enumerate(values, start=1) if value is not None]


def _is_json_records(text: str) -> bool:
    """Whether a text without a telling name is JSON: records as a whole, or its first two lines."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    lines = (line for line in text.split("\n") if line.strip())
    return _is_json(text) or all(map(_is_json, itertools.islice(lines, 2)))


def _is_json(text: str) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _read_json(file: str) -> Records:
    """A list of objects, or one object a line."""
    text = _read_text(file)
    records: list[Any] = []
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except _UNREADABLE as error:
        raise UserError(f"{file}: not readable as JSON objects, one a line or in a list ({error})") from None
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not record:
            raise UserError(f"{file}: record {number} is no JSON object")

    def values(column: str) -> list[Any]:
        for number, record in enumerate(records, start=1):
            if column not in record:
                raise UserError(f"{file}: record {number} has no column {column!r}, but {', '.join(record)}")
        return [record[column] for record in records]

    return Records(list(records[0]), values)


def _read_csv(file: str, delimiter: str = ",") -> Records:
    """The first line names the columns."""
    import pyarrow
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    read = csv.ReadOptions(block_size=min(Path(file).stat().st_size + 1, (1 << 31) - 1))  # a row may be as long

    def values(column: str) -> list[Any]:
        convert = csv.ConvertOptions(include_columns=[column], column_types={column: pyarrow.string()})
        return [str(value) for value in csv.read_csv(file, read, parse, convert).column(column).to_pylist()]

    try:
        return Records(csv.open_csv(file, read, parse).schema.names, values)
    except _UNREADABLE as error:
        raise UserError(f"{file}: not readable as a table with {delimiter!r} between columns ({error})") from None


def _read_tsv(file: str) -> Records:
    return _read_csv(file, "\t")


def _read_parquet(file: str) -> Records:
    from pyarrow import parquet

    try:
        names = parquet.read_schema(file).names
    except _UNREADABLE as error:
        raise UserError(f"{file}: not a readable Parquet file ({error})") from None
    return Records(names, lambda column: parquet.read_table(file, columns=[column]).column(0).to_pylist())


_RECORDS: dict[str, Callable[[str], Records]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
