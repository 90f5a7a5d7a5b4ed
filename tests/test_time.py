"""The step `time` without a GPU: what it refuses, which steps it samples, and the means of what it measured."""

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from gpu_marks import HAS_KERNELS
from packed import pack

from mxmoe_steps.errors import UserError
from mxmoe_steps.inference import gpu
from mxmoe_steps.models.streaming import StreamedModel
from mxmoe_steps.schemes import BLOCKS, SHARED, parse_scheme
from mxmoe_steps.time import TimeOptions, timed_layers
from mxmoe_steps.timing import checkpoints
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


def test_throughput_needs_the_text_of_its_prompts() -> None:
    with pytest.raises(ValueError, match="--throughput takes prompts from --traffic-text web: name it in --sources"):
        TimeOptions(**OPTIONS, throughput="t.parquet", sources={"code": {"files": ["a"]}})
    options = TimeOptions(**OPTIONS | {"tokens": [8192, 64, 256, 1]})
    assert (options.decoded, options.prefilled) == ([1, 64, 256], [8192])
    assert (TimeOptions(**OPTIONS).prefilled, TimeOptions(**OPTIONS | {"tokens": [512]}).decoded) == ([2048], [1])
    options = TimeOptions(**OPTIONS, decode=[16, 2, 16], prefill=[100])
    assert (options.decoded, options.prefilled) == ([2, 16], [100])


@pytest.mark.parametrize(("family", "scheme"), [("qwen2_moe", "w4a16"), ("gpt_oss", "w8a8"), ("olmoe", "w16a16")])
def test_a_layer_under_one_scheme_is_that_of_a_checkpoint_rounded_to_nearest(
    family: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}
    make_checkpoint(family, tmp_path / "model", **(shared if family == "qwen2_moe" else {}))
    packed = pack(tmp_path / "model", tmp_path / "packed", lambda *_: (scheme,) * 3)

    def layer(plan: Any, read: Any, device: torch.device, gate: Any = None, biases: Any = None) -> SimpleNamespace:
        experts = [*range(plan.experts), *([SHARED] if plan.slices else [])]
        places = list(itertools.product(experts, BLOCKS))
        kept = {place: block[0] for place, block in zip(places, read([[place] for place in places]), strict=True)}
        return SimpleNamespace(plan=plan, blocks=kept, gate=gate, biases=biases and {p: biases(*p) for p in places})

    monkeypatch.setattr(checkpoints, "MoeLayer", layer)
    monkeypatch.setattr(gpu, "MoeLayer", layer)
    original, ours = (StreamedModel(path, "bfloat16", "cpu") for path in (tmp_path / "model", packed))
    number = original.folder.moe_layers[-1]
    with original.loaded(original.layer_path(number)):
        made = checkpoints.under_one_scheme(original, parse_scheme(scheme), number)
        found = checkpoints.on_kernels(ours, number)
    assert made.plan == found.plan
    assert made.blocks.keys() == found.blocks.keys()
    for place, block in made.blocks.items():
        other = found.blocks[place]
        if isinstance(block, torch.Tensor):
            assert torch.equal(block, other.bfloat16())  # the kernels take no others
            continue
        assert torch.equal(block.codes, other.codes)
        assert torch.allclose(block.scales.float(), other.scales.float(), rtol=0.01)
    assert (made.gate is None) == (found.gate is None) == (family != "qwen2_moe")
    assert made.gate is None or torch.equal(made.gate, found.gate)
    assert (made.biases is None) == (found.biases is None) == (family != "gpt_oss")
    assert made.biases is None or all(
        torch.equal(bias.bfloat16(), found.biases[p].bfloat16()) for p, bias in made.biases.items()
    )


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
