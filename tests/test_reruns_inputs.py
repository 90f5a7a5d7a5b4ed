"""What runs again after a change of the model, of texts or of results: contents decide, not times."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from workflow import (
    AFTER_CALIBRATE,
    AFTER_CAPTURE,
    EVERYTHING,
    POINT,
    RESULTS,
    change_weights,
    changed,
    edit,
    forget_times,
    planned,
    snakemake,
)


def replace_in_place(project: Path) -> None:
    change_weights(project / "model")


def replace_link(project: Path) -> None:
    """The configured folder becomes a link to an older one."""
    shutil.copytree(project / "model", project / "new")
    change_weights(project / "new")
    for file in (project / "new").iterdir():
        os.utime(file, (1, 1))
    shutil.rmtree(project / "model")
    (project / "model").symlink_to("new")


@pytest.mark.parametrize(("replace", "remembered"), [(replace_in_place, True), (replace_link, False)])
def test_another_model_in_the_same_place_runs_everything(
    project: Path, replace: Callable[[Path], None], remembered: bool
) -> None:
    if not remembered:
        shutil.rmtree(project / ".snakemake")
    replace(project)
    assert planned(project) == EVERYTHING


def test_another_text_in_the_same_place_runs_everything(project: Path) -> None:
    file = project / "words.txt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    os.utime(file, (1, 1))
    assert planned(project) == EVERYTHING


def test_times_and_files_that_nothing_reads_run_nothing(project: Path) -> None:
    forget_times(project / "model")
    os.utime(project / "words.txt")
    (project / "model" / "README.md").write_text("A model card.", encoding="utf-8")
    (project / "model" / "training.json").write_text("{}", encoding="utf-8")
    assert planned(project) == {}


def test_what_is_copied_into_checkpoints_makes_them_again(project: Path) -> None:
    file = project / "model" / "generation_config.json"
    file.write_text('{"do_sample": true}', encoding="utf-8")
    assert planned(project) == {"quantize": 2, "evaluate": 2, "report": 1}


def test_a_tokenizer_file_runs_what_reads_text(project: Path) -> None:
    (project / "model" / "merges.txt").write_text("a b", encoding="utf-8")
    assert planned(project) == EVERYTHING


def test_shards_in_a_folder_of_their_own_are_inputs(project: Path) -> None:
    model = project / "model"
    (model / "weights").mkdir()
    (model / "model.safetensors").rename(model / "weights" / "a.safetensors")
    with safe_open(model / "weights" / "a.safetensors", "pt") as file:
        weight_map = dict.fromkeys(file.keys(), "weights/a.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (model / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    digests = set()
    for _ in range(2):
        text = snakemake(project, "--dry-run", "--printshellcmds", "results/tiny/trace/traffic.parquet")
        digests.add(re.findall(r"mxmoe_steps.trace .*--made-from (\w+)", text)[0])
        change_weights(model / "weights")
    assert len(digests) == 2


LOST = {  # every second one is damaged instead
    "trace/routing.safetensors": {"trace": 1, **AFTER_CALIBRATE},
    "capture/words/layer-000.safetensors": {"capture": 1, **AFTER_CAPTURE},
    "calibrate/gptq/w4a16_g32_asym.safetensors": {"calibrate": 1, "quantize": 1, "evaluate": 1, "report": 1},
    "frontier/b4.5_t64_block_gptq.json": {"frontier": 1, "solve": 1, "quantize": 1, "evaluate": 1, "report": 1},
    "evaluate/original.safetensors": {"evaluate_original": 1, "evaluate": 2, "report": 1},
    f"quantize/{POINT}/model.safetensors": {"quantize": 1, "evaluate": 1, "report": 1},
}


def test_results_that_are_missing_or_damaged_are_made_again(project: Path) -> None:
    memory = project / ".snakemake"
    for number, (name, jobs) in enumerate(LOST.items()):
        file = project / RESULTS / name
        good, times = file.read_bytes(), file.stat().st_mtime_ns
        if number % 2:
            file.unlink()
        else:
            file.write_bytes(good[: len(good) // 2] + b"?" + good[len(good) // 2 + 1 :])
            os.utime(file, ns=(times, times))
        if number % 3 == 2:
            memory.rename(memory.with_name("forgotten"))
        found = planned(project)
        assert found | jobs == found, name
        if number % 3 == 2:
            shutil.rmtree(memory)
            memory.with_name("forgotten").rename(memory)
        file.write_bytes(good)
        os.utime(file, ns=(times, times))
    assert planned(project) == {}


def test_a_hub_model_is_one_commit_and_another_commit_another_model(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = project / "hub" / "models--org--tiny"
    monkeypatch.setenv("HF_HUB_CACHE", str(repository.parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edit(project, changed("model", "path", value="org/tiny"))
    (repository / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(project / "model", repository / "snapshots" / commit)
        (repository / "refs" / "main").write_text(commit, encoding="utf-8")
        assert f"--model org/tiny@{commit} " in snakemake(project, "--dry-run", "--printshellcmds")
    assert planned(project) == EVERYTHING
