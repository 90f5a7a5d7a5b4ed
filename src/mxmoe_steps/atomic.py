"""Atomic writes: a reader sees the old file or folder, the new one or none, never half of one.

Until then a result has a name of its own in each process that writes it: several may write the same one at a time, as
when a step outlives the engine that started it, and the last to finish stays.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_SUFFIX = ".partial"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a file to write in the target's folder; it replaces ``path`` when the block succeeds."""
    target = Path(path)
    temporary = _partial(target)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside the target; it replaces the folder ``path`` when the block succeeds."""
    target = Path(path)
    temporary = _partial(target)
    temporary.mkdir()
    try:
        yield temporary
        _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as sorted, indented JSON; NaN and infinities are refused (ValueError)."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def canonical_json(value: Any) -> str:
    """One-line JSON with sorted keys: the same value always gives the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def working_in(folder: Path, shared: bool = False) -> Iterator[None]:
    """Within the block ``folder`` exists and no other process works in it, or, if ``shared``, only others that share.

    The block may remove it; if it leaves nothing there, the folder goes, and those above it that were made for it.
    File systems without locks give none.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    with _locked(folder, shared) as lock:
        try:
            yield
        finally:
            if not shared:
                with contextlib.suppress(OSError):
                    Path(lock.name).unlink()
                    for empty in (folder, *made):
                        empty.rmdir()


def _locked(folder: Path, shared: bool) -> IO[str]:
    """The folder's lock file, open: the lock holds as long as that."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process may remove the folder at any time
            file = (folder / "lock").open("w", encoding="utf-8")
            _wait_for_lock(file, kind, folder)
            if os.path.samestat(os.stat(folder / "lock"), os.fstat(file.fileno())):
                return file
            file.close()


def _wait_for_lock(file: IO[str], kind: int, folder: Path) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that works in {folder}", file=sys.stderr, flush=True)
        fcntl.flock(file, kind)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise


def _partial(target: Path) -> Path:
    """Name of this process's unfinished ``target``; what dead processes of this machine left of it is removed."""
    host = socket.gethostname()
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{_SUFFIX}"):
        owner, _, pid = left.name[len(target.name) + 2 : -len(_SUFFIX)].rpartition("-")
        if owner == host and pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return target.with_name(f".{target.name}.{host}-{os.getpid()}{_SUFFIX}")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _replace_folder(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; a folder of that name is first moved out of the way, as often as it appears."""
    while True:
        try:
            new.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        old = new.with_name(f"{new.name}.old")
        with contextlib.suppress(FileNotFoundError):
            target.rename(old)
        shutil.rmtree(old, ignore_errors=True)
