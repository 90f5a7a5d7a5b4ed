"""The step `time` without a GPU: what it refuses, which steps it samples, and the means of what it measured."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu_marks import HAS_KERNELS

from mxmoe_steps.errors import UserError
from mxmoe_steps.time import TimeOptions, timed_layers
from mxmoe_steps.timing.times import summary
from mxmoe_steps.timing.traffic import sample_steps

OPTIONS = {"model": "m", "checkpoints": ["c"], "trace": "t", "traffic_text": "web", "tokens": [64], "out": "o.parquet"}


def test_means_over_layers_and_steps_of_medians_over_rounds() -> None:
    rows = [
        {"checkpoint": checkpoint, "layer": layer, "tokens": 64, "step": step, "stage": stage, "us": us}
        for checkpoint, layer, step, stage, us in [
            ("ours", 0, 0, "layer", [1.0, 9.0, 2.0]),
            ("ours", 0, 1, "layer", [4.0, 4.0, 4.0]),
            ("ours", 3, 0, "layer", [6.0, 6.0, 100.0]),
            ("ours", 0, 0, "down", [0.5, 0.5, 0.5]),
            ("original", 0, 0, "grouped_mm", [8.0, 8.0, 8.0]),
            ("original", 0, 0, "batched_mm", [7.0, 7.0, 1.0]),  # the faster of the two counts
            ("original", 3, 0, "grouped_mm", [5.0, 5.0, 5.0]),
        ]
    ]
    assert summary(rows) == {"ours": {64: {"layer": 4.0, "down": 0.5}}, "original": {64: {"layer": 6.0}}}


def test_fewer_steps_are_the_first_of_more() -> None:
    facts = {"sequences": 4, "length": 32}
    for tokens in (1, 64, 300):
        few, many = (sample_steps(facts, ["a", "b"], tokens, "auto", steps, 3) for steps in (2, 6))
        assert [text for text, _ in many] == ["a", "b"] * 3
        for (text, positions), (expected_text, expected) in zip(few, many, strict=False):
            assert text == expected_text
            assert np.array_equal(positions, expected)
            assert len(positions) == tokens


def test_layers_that_have_no_experts_are_refused() -> None:
    assert timed_layers(TimeOptions(**OPTIONS), [1, 2]) == [1, 2]
    assert timed_layers(TimeOptions(**OPTIONS, layers=[2, 2]), [1, 2]) == [2]
    with pytest.raises(UserError, match=r"--layers: layer 0 has no experts; those of m are \[1, 2\]"):
        timed_layers(TimeOptions(**OPTIONS, layers=[0]), [1, 2])


@pytest.mark.skipif(HAS_KERNELS, reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    paths = ["--model", "m", "--checkpoint", "c", "--trace", "t", "--out", str(tmp_path / "o.parquet")]
    command = [
        sys.executable,
        "-m",
        "mxmoe_steps.time",
        *paths,
        "--traffic-text",
        "web",
        "--layer",
        "3",
        "--tokens",
        "9",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: time needs a CUDA GPU and this machine has none")
    assert list(tmp_path.iterdir()) == []
