"""The step `time` on a GPU, on the embedded model under a made-up trace; the timer, on a host that is slow on purpose.

python -m pytest -q -rA tests/gpu/test_timed_layers.py          # prints what it measured
python tests/gpu/test_timed_layers.py                           # compiles the kernels that it needs, without a GPU
"""

import random
import statistics
import time as clock
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_marks import needs_kernels
from packed import pack
from synthetic import WORDS, write_trace

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.identity import fingerprint
from mxmoe_steps.tables import THROUGHPUT, TIMES, read_table
from mxmoe_steps.time import TimeOptions, time
from mxmoe_steps.timing.timer import Timer
from mxmoe_steps.timing.times import rates

pytestmark = needs_kernels

MODEL = Path(__file__).parents[2] / "resources" / "demo-moe"
SCHEMES = {"w4": ("w4a16",) * 3, "mixed": ("w4a16", "w4a16", "w8a8_fp8")}


def make_checkpoints(folder: Path, without_kernels: int | None) -> list[Path]:
    """Packed checkpoints in ``folder``; a layer of theirs takes a scheme that has no kernels on Hopper."""
    folders = []
    for name, schemes in SCHEMES.items():
        dealt = {without_kernels: ("w4a4",) * 3}
        made = pack(MODEL, folder / name, lambda layer, _, d=dealt, s=schemes: d.get(layer, s))
        folders.append(made.rename(folder / f"checkpoint-{name}"))
    return folders


def make_trace(folder: Path) -> str:
    source = open_model(MODEL)
    return write_trace(folder, layers=6, experts=source.experts, top_k=2, texts=("web",), model=fingerprint(source))


def test_a_slow_host_is_not_measured() -> None:
    timer, x = Timer(), torch.randn(64, 64, device="cuda")
    graph = timer.capture(lambda: x @ x)

    def late() -> None:
        clock.sleep(0.003)
        graph.replay()

    prompt, slow = (statistics.median(timer.replays(one, 9)) for one in (graph, SimpleNamespace(replay=late)))
    print(f"{prompt:.2f} us, behind a host that is 3 ms late {slow:.2f} us")
    assert slow < 2 * prompt + 2


def test_every_layer_of_every_checkpoint_is_timed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folders = make_checkpoints(tmp_path, without_kernels=4)
    settings = {"model": str(MODEL), "checkpoints": folders, "trace": make_trace(tmp_path / "trace")}
    settings |= {"traffic_text": "web", "rounds": 3}
    options = TimeOptions(**settings, tokens=[1, 300], steps=2, uniform=["w4a16"], out=tmp_path / "times.parquet")
    time(options)
    rows, facts = read_table(TIMES, options.out)
    assert facts["steps"] == 2
    seen: dict[tuple[str, int, int, int], dict[str, list[float]]] = {}
    for row in rows.to_pylist():
        assert len(row["us"]) == 3
        place = (row["checkpoint"], row["layer"], row["tokens"], row["step"])
        seen.setdefault(place, {})[row["stage"]] = row["us"]
    uniform = options.uniform[0]
    assert {place[0] for place in seen if place[1] == 4} == {"original", uniform}  # no kernels for w4a4
    off = []
    for layer in (0, 1, 2, 3, 5):
        for tokens in (1, 300):
            for step in range(2):
                original = seen["original", layer, tokens, step]
                assert set(original) == ({"grouped_mm", "batched_mm"} if tokens == 1 else {"grouped_mm"})
                for name in (*(f"checkpoint-{name}" for name in SCHEMES), uniform):
                    stages = seen[name, layer, tokens, step]
                    assert ("swiglu" in stages) == (name == "checkpoint-mixed")
                    us = {stage: statistics.median(taken) for stage, taken in stages.items()}
                    apart = sum(taken for stage, taken in us.items() if stage != "layer")
                    if not 0.3 * apart < us["layer"] < 1.2 * apart:  # launches overlap
                        off.append(f"{name} layer {layer} tokens {tokens} step {step}: apart {apart:.1f}, {stages}")
    assert not off, "\n".join([f"{len(off)} of 60 layers are not made of their stages:", *off])
    said = capfd.readouterr().err
    print(said)
    assert "time: layer 5 (6 of 6)" in said
    assert caplog.text.count("layer 4 is not timed") == 2
    assert "300 tokens in a step, us" in said
    with pytest.raises(UserError, match=r"no text 'code' in this trace"):
        time(options.model_copy(update={"traffic_text": "code"}))


def test_whole_models_decode_and_prefill(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = random.Random(0)
    (tmp_path / "web.txt").write_text("\n---\n".join(" ".join(words.choices(WORDS, k=60)) for _ in range(200)))
    sources = {"web": {"files": [str(tmp_path / "web.txt")], "separator": "---"}}
    options = TimeOptions(
        model=str(MODEL), checkpoints=make_checkpoints(tmp_path, without_kernels=None), traffic_text="web",
        trace=make_trace(tmp_path / "trace"), sources=sources,
        layers=[0], steps=1, tokens=[2, 300], rounds=2, prompt=16, generated=24,
        out=tmp_path / "times.parquet", throughput=tmp_path / "throughput.parquet",
    )  # fmt: skip
    before = torch.cuda.memory_allocated()
    time(options)
    left = torch.cuda.memory_allocated() - before
    rows, facts = read_table(THROUGHPUT, options.throughput)
    print(capfd.readouterr().err, facts, f"{left / 1e6:.1f} MB are left on the GPU")
    assert facts["left_out"] == []
    assert "reference arithmetic" not in caplog.text
    assert facts["together"]
    found = rates(rows.to_pylist())
    assert set(found) == {"original", "checkpoint-w4", "checkpoint-mixed"}
    for of in found.values():
        assert set(of) == {("decode", 2), ("prefill", 300)}
        assert all(1 < rate < 1e7 for rate in of.values())
    assert left < 40e6  # 35 MB are left by this test alone, under 20 after others: not the models, 26 and twice 11 MB


def main() -> None:
    """Compile into the kernel cache."""
    import tempfile

    from mxmoe_steps.inference.build import checkpoint_kernels
    from mxmoe_steps.kernels.architectures import DEFAULT
    from mxmoe_steps.kernels.build import build

    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in make_checkpoints(Path(folder), without_kernels=4):
            for kernel in checkpoint_kernels(checkpoint, DEFAULT):
                print(build(kernel))


if __name__ == "__main__":
    main()
