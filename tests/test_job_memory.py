"""The memory that rules ask for holds what was measured, and follows the sizes of the model."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mxmoe_steps.job_memory import Sizes, job_memory
from mxmoe_steps.models.adapters import FAMILIES
from mxmoe_steps.models.families import ModelFolder

ROOT = Path(__file__).parents[1]
QWEN3_30B = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128,
    "num_hidden_layers": 48, "vocab_size": 151936,
}  # fmt: skip
MIXTRAL_8X7B = {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8, "vocab_size": 32000}
STREAMED = {  # the checkpoint of benchmarks/streaming.py, whose peaks docs/models.md lists
    "hidden_size": 1024, "moe_intermediate_size": 704, "shared_expert_intermediate_size": 2816,
    "intermediate_size": 2816, "num_experts": 60, "vocab_size": 4096,
}  # fmt: skip


def sizes(config: dict[str, int], family: str = "qwen3_moe") -> Sizes:
    return Sizes.of(ModelFolder(Path("model"), FAMILIES[family], config))


def test_layers_are_counted_as_they_are_stored() -> None:
    assert sizes(QWEN3_30B).experts == 128 * 3 * 2048 * 768
    assert sizes(MIXTRAL_8X7B, "mixtral").experts == 8 * 3 * 4096 * 14336
    assert sizes(QWEN3_30B).embedding == 151936 * 2048


def test_measured_peaks_fit() -> None:
    found = job_memory(sizes(STREAMED), 2, run_tokens=4 * 512, calibration_tokens=4 * 512)
    for step, measured_gb in {"trace": 1.28, "capture": 1.57, "evaluate": 1.26}.items():
        assert measured_gb * 1e9 < found[step] * 2**20 < 8e9


def test_memory_follows_the_model_and_the_text() -> None:
    small, large = (
        job_memory(sizes(config), 2, 8 * 512, 128 * 4096) for config in (STREAMED, QWEN3_30B)
    )  # the larger model needs more wherever a model is held
    for step in ("trace", "capture", "calibrate", "evaluate", "quantize"):
        assert small[step] < large[step] < 48_000
    once, twice = (job_memory(sizes(QWEN3_30B), 2, 8 * 512, tokens) for tokens in (1 << 19, 1 << 20))
    assert twice["calibrate"] - once["calibrate"] == pytest.approx(5 * 2 * 2048 * (1 << 19) / 2**20, abs=1)
    assert job_memory(sizes(QWEN3_30B), 4, 8 * 512, 1)["trace"] > once["trace"]
    deep = replace(sizes(QWEN3_30B), layer=1 << 34)
    assert job_memory(deep, 2, 8 * 512, 1)["trace"] > 3 * 2 * (1 << 14)


def test_every_job_that_uses_a_gpu_has_one_on_a_cluster() -> None:
    resources = yaml.safe_load((ROOT / "profiles" / "slurm" / "config.yaml").read_text(encoding="utf-8"))
    rules = {
        line.split()[1].rstrip(":")
        for file in (ROOT / "rules").glob("*.smk")
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("rule ")
    }
    steps = ("trace", "capture", "calibrate", "tune", "measure", "evaluate", "tasks", "time")
    with_gpu = {rule for rule in rules if rule.split("_")[0] in steps}
    assert set(resources["set-resources"]) == with_gpu
    assert all(one == {"slurm_partition": "gpu", "gres": "gpu:1"} for one in resources["set-resources"].values())
