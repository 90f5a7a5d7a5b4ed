"""Files and folders appear whole, whoever else writes them, and folders of half-finished work have one worker."""

import multiprocessing
import os
import signal
import socket
import time
from contextlib import suppress
from multiprocessing.synchronize import Event
from pathlib import Path

from mxmoe_steps.atomic import atomic_folder, atomic_path, working_in

SPAWN = multiprocessing.get_context("spawn")


def write_folders(target: Path, mark: str) -> None:
    for _ in range(60):
        with atomic_folder(target) as folder:
            for number in range(4):
                (folder / str(number)).write_text(mark, encoding="utf-8")


def is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def test_a_folder_that_several_write_at_a_time_is_always_whole(tmp_path: Path) -> None:
    target = tmp_path / "result"
    writers = [SPAWN.Process(target=write_folders, args=(target, mark)) for mark in "abc"]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        try:
            handle = os.open(target, os.O_RDONLY)  # one folder, whatever its name is by now
        except FileNotFoundError:
            continue
        names = os.listdir(handle)
        assert len(names) == 4 or not is_at(target, handle)
        seen += 1
        os.close(handle)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert seen
    assert len({file.read_text(encoding="utf-8") for file in target.iterdir()}) == 1
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_that_fails_leaves_the_old_result_and_nothing_else(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("old", encoding="utf-8")
    folder.mkdir()
    (folder / "old").touch()
    with suppress(RuntimeError), atomic_path(file) as temporary:
        temporary.write_text("new", encoding="utf-8")
        raise RuntimeError
    with suppress(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "new").touch()
        raise RuntimeError
    assert file.read_text(encoding="utf-8") == "old"
    assert sorted(tmp_path.rglob("*")) == [file, folder, folder / "old"]


def test_what_dead_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    dead = SPAWN.Process(target=int)
    dead.start()
    dead.join()
    host = socket.gethostname()
    left, living, elsewhere, other = (
        tmp_path / f".result.{host}-{dead.pid}.partial",
        tmp_path / f".result.{host}-{os.getppid()}.partial",
        tmp_path / ".result.another-1.partial",
        tmp_path / f".result.json.{host}-{dead.pid}.partial",
    )
    for folder in (left, living, elsewhere, other):
        folder.mkdir()
    with atomic_path(tmp_path / "result") as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert not left.exists()
    assert living.exists()
    assert elsewhere.exists()
    assert other.exists()


def work(folder: Path, shared: bool, inside: Event, leave: Event) -> None:
    with working_in(folder, shared):
        (folder / "work").touch()
        inside.set()
        leave.wait()
        (folder / "work").unlink(missing_ok=True)


def start(folder: Path, shared: bool) -> tuple[multiprocessing.process.BaseProcess, Event, Event]:
    inside, leave = SPAWN.Event(), SPAWN.Event()
    worker = SPAWN.Process(target=work, args=(folder, shared, inside, leave))
    worker.start()
    return worker, inside, leave


def test_a_second_worker_waits_for_the_first_even_if_it_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "borders"
    first, first_inside, _ = start(folder, shared=False)
    assert first_inside.wait(30)
    second, second_inside, leave = start(folder, shared=False)
    assert not second_inside.wait(1)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    assert second_inside.wait(30)
    leave.set()
    second.join()
    assert second.exitcode == 0
    assert not folder.exists()


def test_those_that_share_a_folder_keep_out_one_that_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "layers"
    workers = [start(folder, shared=True) for _ in range(2)]
    assert all(inside.wait(30) for _, inside, _ in workers)
    alone, alone_inside, leave_alone = start(folder, shared=False)
    for worker, _, leave in workers:
        assert not alone_inside.wait(0.5)
        leave.set()
        worker.join()
    assert alone_inside.wait(30)
    leave_alone.set()
    alone.join()
    assert alone.exitcode == 0


def test_a_folder_may_be_removed_by_who_works_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "borders"
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        with working_in(folder):
            (folder / "work").touch()
            (folder / "work").unlink()
            (folder / "lock").unlink()
            folder.rmdir()
    assert not folder.exists()
