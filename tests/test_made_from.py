"""Records of results, and what they say of files that were changed."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from mxmoe_steps.made_from import Hashes, Results, record_path, recorded, sampled_hash, whole_hash


def make(key: str | None, folder: Path) -> list[str]:
    """A result of a file, a second one and a folder."""
    outputs = [str(folder / name) for name in ("b2.5_t64.json", "other.csv", "figures")]
    with recorded(key, outputs):
        for output in outputs[:2]:
            Path(output).write_text(output[-3:], encoding="utf-8")
        (folder / "figures" / "inner").mkdir(parents=True, exist_ok=True)
        (folder / "figures" / "inner" / "a.svg").write_text("a", encoding="utf-8")
    return outputs


def asked(folder: Path, outputs: list[str], options: str) -> Results:
    results = Results(Hashes(folder / "cache" / "hashes.json"))
    results.add(outputs, options=options)
    return results


def key_of(options: str) -> str:
    results = Results(Hashes("none"))
    results.add(["x"], options=options)
    return results.key("x")


def test_a_record_stands_beside_a_file_and_inside_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder.d").mkdir()
    assert record_path([tmp_path / "b2.5_r0.75.json"]) == tmp_path / "b2.5_r0.75.made.json"
    assert record_path([tmp_path / "folder.d"]) == tmp_path / "folder.d" / "made.json"


def test_states(tmp_path: Path) -> None:
    outputs = make(key_of("a"), tmp_path)
    assert {asked(tmp_path, outputs, "a").state(output) for output in outputs} == {"kept"}
    assert asked(tmp_path, outputs, "b").state(outputs[0]) == "other"
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved, copy_function=shutil.copyfile)  # without times
    there = [output.replace(str(tmp_path), str(moved)) for output in outputs]
    assert asked(moved, there, "a").state(there[0]) == "kept"
    (moved / "figures" / "inner" / "a.svg").write_text("b", encoding="utf-8")
    assert asked(moved, there, "a").state(there[0]) == "changed"
    (tmp_path / "figures" / "new").touch()
    assert asked(tmp_path, outputs, "a").state(outputs[2]) == "changed"
    (tmp_path / "figures" / "new").unlink()
    assert asked(tmp_path, outputs, "a").state(outputs[2]) == "kept"
    (tmp_path / "other.csv").unlink()
    assert asked(tmp_path, outputs, "a").state(outputs[0]) == "changed"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": {}}', "\0"])
def test_a_broken_record_says_nothing(tmp_path: Path, text: str) -> None:
    outputs = make(key_of("a"), tmp_path)
    record_path(outputs).write_text(text, encoding="utf-8")
    assert asked(tmp_path, outputs, "a").state(outputs[0]) == "changed"


def test_a_step_by_hand_removes_the_record_and_a_failed_one_keeps_no_result(tmp_path: Path) -> None:
    outputs = make(key_of("a"), tmp_path)
    make(None, tmp_path)
    assert not record_path(outputs).exists()
    make(key_of("a"), tmp_path)
    with suppress(RuntimeError), recorded(key_of("a"), outputs):
        Path(outputs[0]).write_text("half", encoding="utf-8")
        raise RuntimeError
    assert asked(tmp_path, outputs, "a").state(outputs[0]) == "changed"
    assert not list(tmp_path.glob(".*"))


def test_a_key_covers_options_and_everything_upstream(tmp_path: Path) -> None:
    def keys(first: int, second: int) -> tuple[str, str, str]:
        results = Results(Hashes(tmp_path / "hashes.json"))
        results.add(["a"], option=first)
        results.add(["b"], ["a"], option=second)
        results.add(["c"], ["b"], option=0)
        return results.key("a"), results.key("b"), results.key("c")

    base, upstream, middle = keys(1, 1), keys(2, 1), keys(1, 2)
    assert not set(base) & set(upstream)
    assert base[0] == middle[0]
    assert not set(base[1:]) & set(middle[1:])


def test_only_what_everything_before_it_settles_is_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(Hashes(tmp_path / "hashes.json"))
    results.add(["a"], option=1)
    results.add(["b"], ["a"], option=1)
    for output in ("a", "b"):
        path = tmp_path / output
        with recorded(results.key(output), [path]):
            path.touch()
    monkeypatch.chdir(tmp_path)

    def read() -> Results:
        found = Results(Hashes(tmp_path / "hashes.json"))
        found.add(["a"], option=1)
        found.add(["b"], ["a"], option=1)
        return found

    assert read().settled("b")
    (tmp_path / "a").unlink()
    assert read().state("b") == "kept"
    assert not read().settled("b")


def test_hashes_are_computed_again_only_for_files_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = tmp_path / "weights", tmp_path / "hashes.json"
    file.write_bytes(b"x" * 100)
    hashes = Hashes(cache)
    before = hashes.whole(file)
    hashes.save()
    written = cache.stat().st_mtime_ns
    assert before == whole_hash(file)
    again = Hashes(cache)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", lambda *_: pytest.fail("read again"))
        assert again.whole(file) == before
    again.save()
    assert cache.stat().st_mtime_ns == written
    times = file.stat().st_mtime_ns
    file.write_bytes(b"x" * 99 + b"y")
    os.utime(file, ns=(times, times))
    assert Hashes(cache).whole(file) == whole_hash(file) != before
    cache.write_text("{", encoding="utf-8")
    assert Hashes(cache).whole(file) == whole_hash(file)


def test_inputs_are_known_by_names_and_contents(tmp_path: Path) -> None:
    hashes = Hashes(tmp_path / "hashes.json")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("x", "y"):
            (tmp_path / folder / name).write_text(name, encoding="utf-8")
    first, second = (
        hashes.of_inputs(sorted((tmp_path / folder).iterdir(), reverse=reverse))
        for folder, reverse in (("a", False), ("b", True))
    )
    assert first == second
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "z")
    assert hashes.of_inputs((tmp_path / "b").iterdir()) != first


def test_large_files_are_sampled_from_end_to_end(tmp_path: Path) -> None:
    file = tmp_path / "large"
    size = 64 << 20
    with file.open("wb") as stream:
        stream.truncate(size)
    hashes = {sampled_hash(file)}
    for place in (0, size // 63 * 30 - 10, size - 1):
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"\1")
        hashes.add(sampled_hash(file))
    os.truncate(file, size - 1)
    hashes.add(sampled_hash(file))
    assert len(hashes) == 5
