"""Tokens a second of whole models, on the CPU: workloads, turns, what does not fit, and what the report shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from mxmoe_steps.errors import UserError
from mxmoe_steps.report import ReportOptions, read_measured, report
from mxmoe_steps.tables import THROUGHPUT, TIMES, read_table, write_table
from mxmoe_steps.time import TimeOptions, predicted_times, time_whole, workloads_of
from mxmoe_steps.timing import throughput
from mxmoe_steps.timing.throughput import Rounds, decode_ms, prefill_ms, step_starts, workloads
from mxmoe_steps.timing.times import rate_table, rates, stage_table, summary
from mxmoe_steps.timing.traffic import Routing


def test_workloads_have_the_tokens_that_are_asked_for() -> None:
    text = torch.arange(3 * 10).view(3, 10)
    one, five, some, whole, uneven = workloads(text, [1, 5], [4, 30, 47], 8)
    assert torch.equal(one.prompts, text[:1, :8])
    assert torch.equal(five.prompts, text[[0, 1, 2, 0, 1], :8])
    assert [work.made for work in (one, five)] == [1, 5]
    assert torch.equal(some.prompts, text[:1, :4])
    assert torch.equal(whole.prompts, text)
    assert uneven.prompts.shape == (5, 9)
    assert (uneven.tokens, uneven.made) == (47, 45)
    (short,) = workloads(text, [2], [], 99)
    assert short.prompts.shape == (2, 10)


class Slow:
    """A model whose steps take known times on a clock of their own."""

    device = torch.device("cpu")

    def __init__(self, clock: list[float], step: float) -> None:
        self.clock, self.step, self.asked = clock, step, {}

    def prepare_inputs_for_generation(self) -> None:
        pass

    def generate(self, prompts: torch.Tensor, **options: Any) -> torch.Tensor:
        self.asked = options
        for number in range(options["max_new_tokens"]):
            self.prepare_inputs_for_generation()
            self.clock[0] += 50.0 if number < throughput.SKIPPED else self.step
        return torch.zeros(len(prompts), prompts.shape[1] + options["max_new_tokens"])

    def _supports_logits_to_keep(self) -> bool:
        return False

    def __call__(self, prompts: torch.Tensor) -> None:
        self.clock[0] += self.step * prompts.numel()


def test_the_clock_is_read_between_steps_and_around_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    model, prompts = Slow(clock, 0.25), torch.zeros(3, 4, dtype=torch.long)
    assert decode_ms(model, prompts, 20, cache_implementation="static") == pytest.approx(250.0)
    assert model.asked["cache_implementation"] == "static"
    assert model.asked["attention_mask"].all()
    assert "prepare_inputs_for_generation" not in vars(model)  # as it was
    assert prefill_ms(model, prompts) == pytest.approx(3000.0)
    with pytest.raises(RuntimeError), step_starts(model):
        raise RuntimeError
    assert "prepare_inputs_for_generation" not in vars(model)


class Gpu:
    """Memory for so many fake models, and which were in it at each measurement."""

    def __init__(self, room: int) -> None:
        self.room, self.seen = room, []
        self.models: list[str] = []

    @contextmanager
    def load(self, name: str) -> Iterator[SimpleNamespace]:
        if len(self.models) >= self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.models.append(name)
        try:
            yield SimpleNamespace(name=name)
        finally:
            self.models.remove(name)

    def work(self, kind: str, fails: dict[str, Exception]) -> Any:
        def ms(model: SimpleNamespace, generated: int) -> float:
            if model.name in fails:
                raise fails[model.name]
            self.seen.append((kind, model.name, len(self.models)))
            return {"a": 1.0, "b": 2.0, "c": 4.0}[model.name]

        class Work:
            made = 8

            def __str__(self) -> str:
                return kind

        found = Work()
        found.ms = ms
        return found


@pytest.mark.parametrize(("room", "together"), [(3, True), (2, False), (0, False)])
def test_models_take_turns_or_follow_one_another(room: int, together: bool, caplog: pytest.LogCaptureFixture) -> None:
    gpu = Gpu(room)
    works = [gpu.work("decode", {}), gpu.work("prefill", {"b": ValueError("no such cache\nat all")})]
    rounds = Rounds(works, 16, 3, 0)
    rounds.of({name: (1, partial(gpu.load, name)) for name in "abc"})
    assert rounds.together == together
    assert gpu.models == []
    if room == 0:
        assert rounds.ms == {}
        assert rounds.left_out == [
            f"{name} does not fit in the GPU's memory: its layers alone are timed" for name in "abc"
        ]
        assert all(f"time: {sentence}" in caplog.text for sentence in rounds.left_out)
        return
    assert rounds.ms == {
        ("a", 0): [1.0] * 3, ("b", 0): [2.0] * 3, ("c", 0): [4.0] * 3, ("a", 1): [1.0] * 3, ("c", 1): [4.0] * 3,
    }  # fmt: skip
    assert rounds.left_out == ["b: prefill: no such cache"]
    assert {count for _, _, count in gpu.seen} == ({3} if together else {1})
    order = [name for kind, name, _ in gpu.seen if kind == "decode"]
    if together:
        assert all(sorted(order[at : at + 3]) == ["a", "b", "c"] for at in range(0, 12, 3))  # a round at a time
        assert len({tuple(order[at : at + 3]) for at in range(0, 12, 3)}) > 1


def test_a_workload_that_does_not_fit_is_left_out() -> None:
    gpu = Gpu(2)
    full = torch.OutOfMemoryError("CUDA out of memory")
    failing = {"a": full, "b": ValueError("no such cache")}
    rounds = Rounds([gpu.work("decode", {}), gpu.work("prefill", failing)], 16, 1, 0)
    rounds.of({name: (1, partial(gpu.load, name)) for name in "ab"})
    assert set(rounds.ms) == {("a", 0), ("b", 0)}
    assert rounds.left_out == ["a: prefill: it does not fit in the GPU's memory", "b: prefill: no such cache"]
    assert not rounds.together


def test_tables_for_a_terminal() -> None:
    times = {
        "ours": {64: {"sort": 2.0, "gate_up": 8.0, "swiglu": 2.0, "down": 10.0, "layer": 21.0}},
        "plain": {64: {"sort": 2.0, "gate_up": 9.0, "down": 11.0, "layer": 20.5}},
        "original": {64: {"layer": 142.25}},
    }
    assert stage_table(times, {"ours": {64: 22.0}}).splitlines() == [
        "64 tokens in a step, us  sort  gate_up  down  swiglu  layer  GEMMs  predicted    error",
        "original, transformers                                142.2                           ",
        "plain                     2.0      9.0  11.0           20.5   20.0                    ",
        "ours                      2.0      8.0  10.0     2.0   21.0   20.0       22.0  +10.0 %",
    ]
    assert "predicted" not in stage_table(times, {})
    assert stage_table({}, {}) == ""
    found = {"ours": {("decode", 1): 250.4}, "original": {("decode", 1): 100.0, ("prefill", 8192): 50000.0}}
    assert rate_table(found).splitlines() == [
        "tokens a second, whole model  decode 1  prefill 8192",
        "original                           100        50,000",
        "ours                               250              ",
    ]


def test_from_the_traced_text_to_the_report(finished: Path, tmp_path: Path) -> None:
    """The tiny model and its two checkpoints, on the CPU; times of layers, which take a GPU, are made up."""
    base, sources = finished / "results" / "tiny", {"words": {"files": [str(finished / "words.txt")]}}
    sources["words"]["separator"] = "-----"
    options = TimeOptions(
        model=str(finished / "model"), checkpoints=sorted((base / "quantize").iterdir()), trace=base / "trace",
        traffic_text="words", tokens=[2, 300], sources=sources, uniform=["w4a16_g32"], prompt=8, generated=16, rounds=2,
        profile=base / "profile" / "h20.parquet", out=tmp_path / "times.parquet",
        throughput=tmp_path / "throughput.parquet",
    )  # fmt: skip
    routing = Routing(options.trace)
    works = workloads_of(options, finished / "model", routing.facts)
    assert [(work.phase, work.tokens, tuple(work.prompts.shape)) for work in works] == [
        ("decode", 2, (2, 8)), ("prefill", 300, (5, 60))
    ]  # fmt: skip
    columns, facts = time_whole(options, finished / "model", works, "cpu")
    names = ["original", *(folder.name for folder in options.checkpoints)]
    assert (facts["together"], facts["left_out"]) == (True, [])
    known = {"cuda": "0", "date": "2026-01-01", "device": "a CPU", "driver": "", "torch": "0", "rounds": 2}
    known |= {"model": routing.facts["model"], "text": "words"}
    write_table(THROUGHPUT, options.throughput, columns, known | facts)
    rows, _ = read_table(THROUGHPUT, options.throughput)
    measured = rates(rows.to_pylist())
    assert sorted(measured) == sorted(names)
    assert all(len(measured[name]) == 2 for name in names)
    assert all(len(ms) == 2 for ms in rows["ms"].to_pylist())

    stages = {"gate_up": 2.0, "down": 1.0, "layer": 7.0}
    layers = [
        {"checkpoint": name, "layer": layer, "tokens": tokens, "step": 0, "stage": stage, "us": [us, us]}
        for name in names for layer in (0, 1) for tokens in (2, 300)
        for stage, us in ({"grouped_mm": 9.0} if name == "original" else stages).items()
    ]  # fmt: skip
    cells = {name: [row[name] for row in layers] for name in TIMES.schema.names}
    write_table(TIMES, options.out, cells, known | {"compiler": "none", "repeats": 1, "steps": 1})

    from mxmoe_steps.models.streaming import StreamedModel
    from mxmoe_steps.timing.profile import read_profile

    original = StreamedModel(finished / "model", "float32", "cpu")
    predicted = predicted_times(options, read_profile(options.profile), original, {0, 1})
    assert set(predicted) == {*names[1:], "w4a16_g32_asym"}
    printed = stage_table(summary(layers), predicted)
    assert printed.count("tokens in a step") == 2
    assert printed.count(" %\n") + printed.endswith(" %") >= 4

    results = {
        step: [file for file in (base / step).glob("*.json") if ".made" not in file.name]
        for step in ("evaluate", "solve", "frontier")
    }
    made = ReportOptions(
        title="tiny", evaluations=results["evaluate"], allocations=results["solve"], trace=base / "trace",
        frontiers=[file for file in results["frontier"] if "block" in file.name],
        losses=sorted((base / "calibrate" / "gptq").glob("*.parquet")), profile=options.profile, times=options.out,
        throughput=options.throughput, traffic_text="words", tokens=[2, 300], html=tmp_path / "report.html",
        csv=tmp_path / "summary.csv", figures=tmp_path / "figures",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"times.parquet and the allocations are of different models; run time again"):
        read_measured(made, "another")
    with pytest.raises(UserError, match=r"throughput.parquet and the allocations are of different models"):
        read_measured(made.model_copy(update={"times": None}), "another")
    report(made)
    table = pd.read_csv(made.csv).set_index("checkpoint")
    for name in names:
        assert table.loc[name, "decode_2_tokens_per_s"] == pytest.approx(measured[name]["decode", 2], rel=1e-4)
        assert table.loc[name, "measured_moe_us_300_tokens"] == (9.0 if name == "original" else 7.0)
    for name in names[1:]:  # other sampled steps
        assert table.loc[name, "estimated_layer_us_300_tokens"] == pytest.approx(predicted[name][300], rel=0.1)
    page = made.html.read_text(encoding="utf-8")
    assert '<section id="measured">' in page
    assert "<th>tok/s, decode 2</th>" in page
    assert "Whole models were measured on a CPU (2026-01-01) in turns, in transformers" in page
