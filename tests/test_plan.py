"""What the rules work out in plain Python: schemes, budgets, borders, pins, hashes of contents."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from workflow import SETTINGS, change_weights

from mxmoe_steps.config.loading import load_config
from mxmoe_steps.config.points import points
from mxmoe_steps.config.sections import Config
from mxmoe_steps.made_from import Hashes
from mxmoe_steps.models.families import open_original
from mxmoe_steps.workflow import plan
from mxmoe_steps.workflow.contents import Contents


@pytest.fixture
def place(tiny_moe: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a text."""
    shutil.copytree(tiny_moe, tmp_path / "model")
    shutil.copyfile(text_file, tmp_path / "words.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(**changes: Any) -> Config:
    return load_config(SETTINGS | changes, "my.yaml")


def contents(place: Path, config: Config | None = None) -> dict[str, str | None]:
    """Every hash, as a new process computes it."""
    found = Contents(config or config_of(), "model", open_original("model"), Hashes(place / "hashes.json"))
    return {
        "model": found.model(), "tokenizer": found.tokenizer(), "copied": found.copied(),
        "texts": found.texts(["words"]), "h100": found.hardware("h100"), "h20": found.hardware("h20"),
    }  # fmt: skip


def test_contents_follow_bytes_and_nothing_else(place: Path) -> None:
    before = contents(place)
    assert [str(before[name]).split("@")[0] for name in ("model", "tokenizer", "copied", "texts", "h100")] == [
        "weights", "tokenizer", "copied", "texts", "measurements"
    ]  # fmt: skip
    assert json.loads(str(before["h20"]))["device"]
    for file in [*(place / "model").iterdir(), place / "words.txt"]:
        os.utime(file, (1, 1))
    (place / "model" / "notes.md").write_text("nothing", encoding="utf-8")
    assert contents(place) == before

    def changed() -> set[str]:
        return {name for name, value in contents(place).items() if value != before[name]}

    change_weights(place / "model")
    assert changed() == {"model"}
    (place / "model" / "tokenizer.json").write_bytes((place / "model" / "tokenizer.json").read_bytes() + b" ")
    assert changed() == {"model", "tokenizer", "copied"}
    (place / "words.txt").write_bytes((place / "words.txt").read_bytes()[::-1])
    assert changed() == {"model", "tokenizer", "copied", "texts"}


def test_a_model_of_the_hub_has_a_commit_instead_of_a_hash(place: Path) -> None:
    found = Contents(config_of(), "org/name@abc", open_original("model"), Hashes(place / "hashes.json"))
    assert {found.model(), found.tokenizer(), found.copied()} == {"org/name@abc"}
    assert found.hardware("local") is None


def test_one_process_pins_the_model_for_the_others(place: Path) -> None:
    pin = place / "pin.json"
    assert plan.pinned_model("model", pin, True)[0] == "model"
    pin.write_text(json.dumps({"org/name": "model"}), encoding="utf-8")
    path, described = plan.pinned_model("org/name", pin, False)
    assert (path, described.path) == ("model", Path("model"))
    assert plan.pinned_model("model", pin, False)[0] == "model"


def test_schemes_and_budgets(place: Path) -> None:
    config = config_of(
        solve={"traffic": "words", "keep_original": True, "time_as": ["w2a16_g32=w4a8_fp8"]},
        sweep=[{"budget_bits": [4.5, 3.0], "tokens": 64}, {"budget_bits": 5, "tokens": 64, "granularity": "layer"}],
    )
    schemes = ["w2a16_g32_asym", "w4a16_g32_asym", "w8a8_g-1_sym_fp8"]
    assert plan.candidates(config_of()) == schemes
    assert plan.candidates(config) == [*schemes, "w16a16"]
    assert plan.timed_schemes(config) == ["w16a16", "w4a16_g32_asym", "w4a8_g128_sym_fp8", "w8a8_g-1_sym_fp8"]
    assert plan.least_budgets(points(config)) == ["block=3", "layer=5", "uniform=3"]


def test_borders_and_memory(place: Path) -> None:
    model = open_original("model")
    assert plan.part_borders(config_of(), model) == []
    assert plan.part_borders(config_of(runtime={"layers_per_job": 1}), model) == [1]
    assert plan.part_borders(config_of(runtime={"layers_per_job": 2}), model) == []
    least = plan.memory_of_steps(config_of(), model)
    more = plan.memory_of_steps(config_of(runtime={"batch": 1 << 20}), model)
    assert more["trace"] > least["trace"] > 0
    assert more["solve"] == least["solve"]


def test_used_sources_are_those_of_mixes_too(place: Path) -> None:
    words = SETTINGS["texts"]["words"]
    texts = {"words": words, "other": words, "both": {"mix": ["words"]}}
    config = config_of(texts=texts)
    assert plan.used_sources(config, ["both"]) == {"both": {"mix": ["words"]}, "words": words}
    assert plan.extensions_of_texts(config, ["both"]) == []
    assert plan.extensions_of_calibration(config, "gptq+hadamard") == []
    assert plan.more_losses(config) == []
