"""What a result is made from, in a record beside it, so that a result can be told from one that is asked for.

Snakemake compares what it remembers of its own runs, and times of files. It remembers nothing of results that were
copied or replaced, and times say nothing about contents. A step therefore leaves a record beside its result: a digest
of everything that decides the bytes, handed to it by the workflow as ``--made-from``, with size and hash of every file
that it wrote. The digest covers those of the results that the step reads: a change anywhere upstream changes it.
Stdlib only.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mxmoe_steps.atomic import canonical_json, working_in, write_json

State = Literal["kept", "other", "changed"]

_RECORD = "made.json"
_NOT_OURS = (_RECORD, ".snakemake_timestamp")  # files in a result's folder that are not part of it
_BLOCK, _BLOCKS = 1 << 16, 64  # of a large result, this much is hashed


def record_path(outputs: Sequence[str | os.PathLike[str]]) -> Path:
    """Record of a result: inside it if it is a folder, else beside its first file."""
    first = Path(outputs[0])
    return first / _RECORD if first.is_dir() else first.with_suffix(f".{_RECORD}")


@contextlib.contextmanager
def recorded(made_from: str | None, outputs: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    """Record that the block makes ``outputs``, files and folders, from ``made_from``.

    None, as when a step runs by hand, removes a record: what it says is no longer known to be true. One process makes a
    result at a time; one that outlived its engine finishes before the next one begins, so the last one stays.
    """
    first = Path(outputs[0])
    with working_in(first.with_name(f".{first.name}.lock")):
        yield
        path = record_path(outputs)
        if made_from is None:
            path.unlink(missing_ok=True)
        else:
            write_json(path, {"made_from": made_from, "files": _described(outputs, sampled_hash)})


def sampled_hash(path: Path) -> str:
    """Hash of size and content; of a file larger than 4 MiB, of blocks from its beginning to its end."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            digest.update(file.read())
        else:
            for number in range(_BLOCKS):
                file.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def whole_hash(path: Path) -> str:
    """Hash of content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class Hashes:
    """Hashes of files, kept in the file ``cache`` and computed again where size, times or inode have changed."""

    def __init__(self, cache: str | os.PathLike[str]) -> None:
        self._cache = Path(cache)
        try:
            self._known: dict[str, Any] = json.loads(self._cache.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}
        self._new = False

    def whole(self, path: Path) -> str:
        """Its `whole_hash`."""
        return self._look_up(path, whole_hash)

    def sampled(self, path: Path) -> str:
        """Its `sampled_hash`."""
        return self._look_up(path, sampled_hash)

    def of_inputs(self, files: Iterable[Path]) -> str:
        """One hash of names and contents, whatever the files' times and folder."""
        found = sorted((file.name, self.whole(file)) for file in files)
        return hashlib.sha256(canonical_json(found).encode()).hexdigest()[:16]

    def save(self) -> None:
        """Write the cache if it has grown."""
        if self._new:
            write_json(self._cache, self._known)

    def _look_up(self, path: Path, compute: Callable[[Path], str]) -> str:
        status = path.stat()
        mark = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self._known.setdefault(f"{compute.__name__} {path}", {})
        if known.get("mark") != mark:
            known |= {"mark": mark, "hash": compute(path)}
            self._new = True
        return str(known["hash"])


class Results:
    """The results that a configuration asks for: what each is to be made from, and whether what is there is it."""

    def __init__(self, hashes: Hashes) -> None:
        self._hashes = hashes
        self._keys: dict[str, str] = {}
        self._states: dict[str, State] = {}
        self._settled: dict[str, bool] = {}

    def add(self, outputs: Sequence[str], reads: Sequence[str] = (), **made_from: Any) -> None:
        """A result of one job, the results that the job ``reads``, and everything else that decides its bytes."""
        upstream = [self._keys[output] for output in reads]
        key = hashlib.sha256(canonical_json([upstream, made_from]).encode()).hexdigest()[:16]
        state = self._state_of(outputs, key)
        settled = state == "kept" and all(self._settled[output] for output in reads)
        for output in outputs:
            self._keys[output], self._states[output], self._settled[output] = key, state, settled

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def key(self, output: str) -> str:
        """Digest of what it is to be made from."""
        return self._keys[output]

    def state(self, output: str) -> State:
        """``kept``: it is what is asked for; ``other``: made from something else; ``changed``: not as it was written.

        A result that is missing, has no record or lacks a file counts as changed.
        """
        return self._states[output]

    def settled(self, output: str) -> bool:
        """Whether it and all that it was made from are kept: no job that leads to it runs."""
        return self._settled[output]

    def is_made(self, first: str) -> bool:
        """Whether the result whose first output this is has been made, by now, from what is asked for."""
        try:
            record = json.loads(record_path([first]).read_text(encoding="utf-8"))
            return bool(record["made_from"] == self._keys[first])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _state_of(self, outputs: Sequence[str], key: str) -> State:
        try:
            record = json.loads(record_path(outputs).read_text(encoding="utf-8"))
            if record["files"] != _described(outputs, self._hashes.sampled):
                return "changed"
            return "kept" if record["made_from"] == key else "other"
        except (OSError, ValueError, KeyError, TypeError):
            return "changed"


def _described(outputs: Sequence[str | os.PathLike[str]], hash_of: Callable[[Path], str]) -> dict[str, str]:
    """Name, relative to the first output's folder, and hash of every file of a result."""
    base = Path(outputs[0]).parent
    files = [file for output in outputs for file in _files(Path(output))]
    return {os.path.relpath(file, base): hash_of(file) for file in files}


def _files(output: Path) -> list[Path]:
    if not output.is_dir():
        return [output]
    return sorted(file for file in output.rglob("*") if file.is_file() and file.name not in _NOT_OURS)
