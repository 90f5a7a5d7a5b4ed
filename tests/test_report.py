"""The report's arithmetic and sentences."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mxmoe_steps.errors import UserError
from mxmoe_steps.reporting.checkpoints import Checkpoint
from mxmoe_steps.reporting.domains import domain_lines
from mxmoe_steps.reporting.figures import blocks, frontiers, gpu
from mxmoe_steps.reporting.figures import checkpoints as drawn
from mxmoe_steps.reporting.figures.frontiers import model_hull
from mxmoe_steps.reporting.headline import headline_table
from mxmoe_steps.reporting.measured import MEASURED_HEADS, measured_rows
from mxmoe_steps.reporting.notes import measured_note, published_note, starved_note, time_note
from mxmoe_steps.reporting.origins import steps_taken
from mxmoe_steps.reporting.summary import headlines, prediction_errors, rate_columns, summary_table, time_columns
from mxmoe_steps.reporting.summary_html import domains_html, headline_html, table_html
from mxmoe_steps.reporting.terminal import terminal_table
from mxmoe_steps.schemes import parse_scheme


@pytest.mark.parametrize("seed", range(20))
def test_model_hull_is_the_best_of_all_combinations(seed: int) -> None:
    generator = np.random.default_rng(seed)
    parts = []
    for _ in range(3):  # random lower-left hulls: convex, falling
        steps = generator.uniform(0.1, 1, (generator.integers(0, 5), 2))
        steps = steps[np.argsort(-steps[:, 1] / steps[:, 0])]
        times = np.cumsum([generator.uniform(1, 2), *steps[:, 0]])
        losses = 10 - np.cumsum([generator.uniform(0, 1), *steps[:, 1]])
        vertices = [SimpleNamespace(time_us=t, loss_sum=loss) for t, loss in zip(times, losses, strict=True)]
        parts.append(SimpleNamespace(vertices=vertices[::-1]))
    times, losses = model_hull(parts)
    sums = np.array(
        [
            (sum(v.time_us for v in combination), sum(v.loss_sum for v in combination))
            for combination in itertools.product(*(part.vertices for part in parts))
        ]
    )
    assert (np.diff(times) > 0).all()
    for weight in np.linspace(0.01, 0.99, 33):
        best = (weight * sums[:, 0] + (1 - weight) * sums[:, 1]).min()
        assert (weight * times + (1 - weight) * losses).min() == pytest.approx(best)


def test_the_note_says_where_time_does_not_matter() -> None:
    times = {"original": {64: 10.0, 8192: 50.0}, "b3": {64: 9.8, 8192: 30.0}}
    note = time_note(times, {"estimate": True, "device": "GPU"}, {"w1a16_g128_asym": "w2a16_g128_asym"})
    assert "roofline estimate" in note
    assert "At 64 tokens in a step all checkpoints take within 5 % of the same time (9.8 to 10.0" in note
    assert "At 8192" not in note
    assert "w1a16_g128_asym has no kernel of its own: its time is an estimate, that of w2a16_g128_asym." in note
    error = {"problems": 100, "median": 0.04, "p95": 0.125}
    measured = {"estimate": False, "device": "GPU", "arch": "sm_90a", "source": "measured on a day",
                "errors": {"mixed": error},
                "kernels": {}, "repeat_spread": {"median": 0.01, "p95": 0.05}}  # fmt: skip
    note = time_note(times, measured, {})
    assert "fitted to measured kernels" in note
    assert "measured on a day, in an earlier version." in note
    assert "4.0 % (95th percentile 12.5 %) on 100 launches of mixed schemes" in note


def test_the_figure_of_kernel_times_shows_held_out_launches() -> None:
    tiles = pd.DataFrame({"phase": "prefill", "scheme": "w16a16", "tile_tokens": [16, 64], "kstep_us": [0.5, 0.8]})
    held_out = {"measured_us": [10.0, 20.0], "predicted_us": [11.0, 19.0], "mixed": [True, False]}
    facts = {"sms": 132, "estimate": False, "held_out": held_out}
    measured = gpu.times(tiles, facts)
    assert "predicted / measured" in measured
    assert measured == gpu.times(tiles, facts)
    assert "no launches were measured" in gpu.times(tiles, {"sms": 132, "estimate": True})


def test_experts_that_saw_too_little_are_named() -> None:
    rows = [(layer, expert, block) for layer in (0, 1) for expert in range(-1, 4) for block in ("gate", "up", "down")]
    losses = pd.DataFrame(rows, columns=["layer", "expert", "block"]).assign(tokens=50, fallback=False)
    assert starved_note(losses) == []
    few = (losses["layer"] == 1) & (losses["expert"] == 2)
    losses.loc[few, "tokens"], losses.loc[few & (losses["block"] == "down"), "fallback"] = 7, True
    losses.loc[losses["expert"] == 0, "tokens"] = 0
    (note,) = starved_note(losses)
    assert "3 of 8 saw too few" in note
    assert "0 of layer 0 (0 tokens), 0 of layer 1 (0 tokens), 2 of layer 1 (7 tokens)." in note


def test_jobs_of_a_step_are_added_up(tmp_path: Path) -> None:
    head = "s\th:m:s\tmax_rss\tcpu_time\n"
    for name, row in {"solve/a.tsv": "2.5\t0\t30.5\t1.5\n", "solve/b.tsv": "1\t0\tNA\t-\n",
                      "trace-2.tsv": "8\t0\t700\t9\n", "trace.tsv": "1\t0\t600\t1\n",
                      "solve/gone.tsv": "9\t0\t9\t9\n", "capture/gone.tsv": "1\t0\t1\t0.5\n"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(head + row)
    assert steps_taken(tmp_path, ["a_r1", "b"]) == [
        ["trace", "2", "9.0", "10.0", "700"], ["solve", "2", "3.5", "1.5", "30"], ["capture", "1", "1.0", "0.5", "1"]
    ]  # fmt: skip
    (tmp_path / "solve" / "a.tsv").write_text("no table\n1\n")
    with pytest.raises(UserError, match=r"a.tsv: is no benchmark of Snakemake's; remove it"):
        steps_taken(tmp_path, ["a_r1"])


def test_schemes_of_every_width_have_a_colour() -> None:
    names = [parse_scheme(f"w{bits}a16").name for bits in (1, 2, 3, 4, 6, 8, 16)]
    rows = [[0, expert, name, name, name] for expert, name in enumerate(names)]
    shown = blocks.allocation([allocation("block", "gptq", r=0.5) | {"assignment": rows}])
    assert all(name in shown for name in names)


def test_figures_of_a_large_sweep_draw_what_can_be_read() -> None:
    one = allocation("block", "gptq", r=0.5)
    allocations = [one | {"budget_bits": 2 + number / 200} for number in range(1000)]
    drawn = blocks.allocation(allocations)
    assert ">2 bits<" in drawn
    assert "6.995 bits" in drawn
    assert drawn.count(" bits<") == 12
    part = SimpleNamespace(vertices=[SimpleNamespace(time_us=1.0, loss_sum=2.0)])
    fronts = [
        ({"tokens": tokens, "loss": "root_sum_squares", **{key: one[key] for key in ("granularity", "quantizer")},
          "budget_bits": 2 + number / 100}, [part])
        for tokens in range(64, 74) for number in range(100)
    ]  # fmt: skip
    page = frontiers.frontiers(fronts, [], estimate=True)
    assert page.count("tokens in a step") == 4
    assert page.count("bits, per block") == 12


def allocation(granularity: str, quantizer: str, **goal: Any) -> dict[str, Any]:
    goals = dict.fromkeys(("r", "max_time_us", "max_loss")) | goal
    rows = [[0, 0, *["w2a16_g128_asym"] * 3]]
    point = {"budget_bits": 2.25, "bits": 2.25, "tokens": 64, "granularity": granularity, "quantizer": quantizer,
             "domains": {"losses": {"a": 1.0, "b": 3.0}, "uniform": {"a": 2.0, "b": 2.0}}}  # fmt: skip
    return point | goals | {"assignment": rows}


def test_summary_orders_rows_and_names_what_each_is(tmp_path: Path) -> None:
    def metrics(perplexity: float, kl: float) -> dict[str, Any]:
        overall = {"perplexity": perplexity, "kl": kl}
        published = {"name": "org/name", "commit": "abc", "formats": ["fp8"], "expert_bits": 8.5}
        published |= {"bytes": 4_000_000, "bytes_16_bit": 8_000_000}
        sizes = {"weights_bytes": 2_500_000, "other_bytes": 500_000}
        return {"overall": overall, "texts": {"en": overall}, "published": published, **sizes}

    tuned = metrics(10.5, 0.05) | {"tuned": True}
    checkpoints = [
        Checkpoint("better", tuned, allocation("block", "gptq", r=1.0)),
        Checkpoint("ours", metrics(11, 0.1), allocation("block", "gptq", max_time_us=120.0)),
        Checkpoint("gptq", metrics(12, 0.2), allocation("uniform", "gptq", r=1.0)),
        Checkpoint("rtn", metrics(15, 0.5), allocation("uniform", "rtn", r=1.0)),
        Checkpoint("original", metrics(10, 0.0), None),
    ]
    times = {checkpoint.name: {64: 1.5, 8192: 3.0} for checkpoint in checkpoints}
    table = summary_table(checkpoints, times, estimate=True)
    assert list(table["kind"]) == ["original", "uniform rtn", "uniform gptq", "ours", "ours tuned"]
    assert list(table["scheme"]) == ["fp8", "w2a16_g128_asym", "w2a16_g128_asym", "mixed", "mixed"]
    assert list(table["goal"].fillna("")) == ["", "", "", "max_time_us=120", "r=1"]
    assert time_columns(table) == {"estimated_layer_us_64_tokens": 64, "estimated_layer_us_8192_tokens": 8192}
    assert list(table["bits"]) == [8.5, *[2.25] * 4]
    assert list(table["size_mb"]) == [2.5] * 5
    assert prediction_errors(table) == {}
    assert measured_note(table, None) == []
    measured = {
        "original": {64: {"layer": 9.0}},
        "ours": {64: {"layer": 4.0, "gate_up": 0.75, "down": 0.5}, 8192: {"layer": 8.0, "gate_up": 2.0, "down": 2.0}},
    }
    speeds = {
        "original": {("decode", 1): 100.0, ("decode", 64): 3000.0, ("prefill", 8192): 50000.0},
        "ours": {("decode", 1): 250.0, ("decode", 64): 9000.0},  # a prefill was left out
    }
    timed = summary_table(checkpoints, times, True, measured, speeds)
    assert rate_columns(timed) == {
        "decode_1_tokens_per_s": ("decode", 1),
        "decode_64_tokens_per_s": ("decode", 64),
        "prefill_8192_tokens_per_s": ("prefill", 8192),
    }
    assert rate_columns(table) == {}
    name = "ours, per block, max_time_us=120, 64 tokens"
    assert measured_rows(timed) == [
        ["original, fp8", "1 decode", "", "", "", "", "", "100", "1.00"],
        [name, "1 decode", "", "", "", "", "", "250", "2.50"],
        ["original, fp8", "64 decode", "", "", "", "9.0", "1.00", "3,000", "1.00"],
        [name, "64 decode", "1.5", "1.2", "+20.0%", "4.0", "0.44", "9,000", "3.00"],
        ["original, fp8", "8192 prefill", "", "", "", "", "", "50,000", "1.00"],
        [name, "8192 prefill", "3.0", "4.0", "-25.0%", "8.0", "", "", ""],
    ]
    assert {len(row) for row in measured_rows(timed)} == {len(MEASURED_HEADS)}
    assert measured_rows(table) == []
    top = headline_html(timed, True)
    assert (
        "<th>layer µs, 64 tok</th><th>layer µs, 8192 tok</th><th>tok/s, decode 1</th><th>tok/s, prefill 8192</th>"
        in top
    )
    assert "est. µs" not in top
    assert "est. µs, 64 tok" in headline_html(table, True)
    at_64 = timed.set_index("kind")["measured_moe_us_64_tokens"].dropna()
    assert at_64.to_dict() == {"original": 9.0, "ours": 4.0}
    assert prediction_errors(timed) == {64: [pytest.approx(0.2)], 8192: [-0.25]}
    (note,) = measured_note(timed, {"device": "GPU", "date": "2026-01-01", "text": "web"})
    assert "on GPU (2026-01-01) under the routing of web" in note
    whole = {"device": "GPU", "date": "2026-01-01", "transformers": "5.17", "text": "web", "together": False}
    whole |= {"left_out": ["original does not fit in the GPU's memory"]}
    assert measured_note(table, {"device": "GPU"}, whole) == [
        "Whole models were measured on GPU (2026-01-01) one after the other, because they do not fit in its memory"
        " together, in transformers 5.17, on prompts of web.",
        "Not measured: original does not fit in the GPU's memory.",
    ]
    assert "off by 20.0 % at 64 tokens (+20.0 to +20.0 %); 25.0 % at 8192 tokens (-25.0 to -25.0 %)." in note
    assert "layer µs" not in table_html(timed, True)  # there is no room: measured times have a table of their own
    assert "measured time of a layer" in drawn.speed(timed, estimate=True)
    assert "measured time of a layer" not in drawn.speed(table, estimate=True)
    assert list(timed["predicted_loss"].fillna(0)) == [0, 4, 4, 4, 0]  # neither of the original nor of tuned weights
    assert "as predicted" in drawn.losses(timed, "fisher")
    assert list(table["other_mb"]) == [0.5] * 5
    assert list(table["of_16_bit"]) == [0.3125] * 5
    assert list(table["of_published"]) == [0.625] * 5
    page = table_html(table, estimate=True)
    assert "<td>31.2%</td><td>62.5%</td>" in page
    assert "at most 2.25 bits, 14% of 16, 26% of the published 8.50<" in page
    (note,) = published_note(checkpoints[0].metrics["published"])
    assert note.startswith("The original is commit abc of org/name. The original was published in fp8:")
    assert "published in fp8: 8.50 bits an expert weight and 4.00 MB, 50.0% of its size in 16 bits" in note
    table.to_csv(tmp_path / "summary.csv", index=False)
    lines = terminal_table(tmp_path / "summary.csv", tmp_path / "report.html").splitlines()
    assert lines[0].split() == ["bits", "MB", "KL", "perplexity", "us,", "64", "tok", "us,", "8192", "tok"]
    assert lines[1].split() == ["original,", table["scheme"][0], "8.500", "2.500", "0.0", "10.00", "1.500", "3.000"]
    assert [line.split("  ")[0] for line in lines[2:6]] == [
        "uniform rtn, w2a16_g128_asym", "uniform gptq, w2a16_g128_asym",
        "ours, per block, max_time_us=120, 64 tokens", "ours tuned, per block, r=1, 64 tokens"
    ]  # fmt: skip
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-1].startswith(str(tmp_path / "summary.csv"))
    timed.to_csv(tmp_path / "timed.csv", index=False)
    heads = terminal_table(tmp_path / "timed.csv", tmp_path / "report.html").splitlines()[0].split("  ")
    assert [head for head in heads if "tok" in head] == ["tok/s, decode 1", "tok/s, prefill 8192"]
    many = pd.concat([table, *(table[table["kind"] == "ours"].assign(kl=kl) for kl in np.linspace(0.05, 0.5, 40))])
    many.to_csv(tmp_path / "summary.csv", index=False)
    lines = terminal_table(tmp_path / "summary.csv", tmp_path / "report.html").splitlines()
    assert len(lines) == 1 + 5 + 1
    assert "0.0500" in lines[4]
    assert lines[-1].startswith("40 more in ")
    (line,) = headlines(table)
    assert line.startswith(
        "2.25 bits: perplexity 10.50 (KL 0.0500) with one scheme per block, tuned; uniform rtn w2a16"
    )
    (line,) = headlines(table[table["kind"] != "ours tuned"])
    assert line.startswith("2.25 bits: perplexity 11.00 (KL 0.1000) with one scheme per block; uniform rtn w2a16 15.00")
    assert line.endswith("original 10.00")


def test_every_text_stands_beside_the_uniform_checkpoint_worst_first() -> None:
    def checkpoint(name: str, granularity: str, quantizer: str, en: float, code: float, budget: float) -> Checkpoint:
        texts = {"en": {"perplexity": 9.0, "kl": en}, "code": {"perplexity": 9.0, "kl": code}}
        published = {"formats": [], "expert_bits": 16.0, "bytes": 9, "bytes_16_bit": 9}
        sizes = {"weights_bytes": 1, "other_bytes": 0, "published": published}
        metrics = {"overall": {"perplexity": 9.0, "kl": (en + code) / 2}, "texts": texts, **sizes}
        return Checkpoint(name, metrics, allocation(granularity, quantizer, r=1.0) | {"budget_bits": budget})

    original = Checkpoint("original", checkpoint("", "block", "rtn", 0.0, 0.0, 1.0).metrics, None)
    checkpoints = [
        original,
        checkpoint("rtn", "uniform", "rtn", 0.1, 0.1, 2.25),
        checkpoint("gptq", "uniform", "gptq", 0.4, 0.2, 2.25),
        checkpoint("better", "block", "gptq", 0.1, 0.3, 2.25),
        checkpoint("later", "expert", "gptq", 0.4, 0.3, 2.25),
        checkpoint("other", "block", "gptq", 0.1, 0.2, 3.25),
        checkpoint("u3", "uniform", "rtn", 0.2, 0.2, 3.25),
        checkpoint("alone", "block", "gptq", 0.1, 0.2, 5.0),
    ]
    assert domain_lines(checkpoints) == [
        "2.25 bits: KL over that of uniform weights: code 1.50, en 0.25. It is worse on code.",
        "3.25 bits: KL over that of uniform weights: code 1.00, en 0.50. It is worse on none.",
    ]
    table = summary_table(checkpoints, {one.name: {} for one in checkpoints}, estimate=False).set_index("checkpoint")
    assert dict(table["texts_over_uniform"].dropna()) == {
        "better": "code 1.50, en 0.25", "later": "code 1.50, en 1.00", "other": "code 1.00, en 0.50", "alone": ""
    }  # fmt: skip
    assert list(table.loc["better", ["kl_over_uniform", "worst_over_uniform"]]) == pytest.approx([2 / 3, 1.5])
    assert table.loc["alone", ["kl_over_uniform", "worst_over_uniform"]].isna().all()
    assert set(table["predicted_over_uniform"].dropna()) == {"b 1.50, a 0.50"}
    assert list(table.loc["better", ["kl_en", "kl_code"]]) == [0.1, 0.3]
    assert "worst text" in drawn.quality(table.reset_index())
    page = domains_html(table.reset_index())
    assert page.count("<tr>") == 5
    assert domains_html(table.reset_index().replace({"kind": {"ours": "ours tuned"}})).count("<tr>") == 5
    best = headline_table(table.reset_index())  # perplexities are all the same: the smallest budget is the answer
    assert list(best["checkpoint"]) == ["better", "rtn", "original", "other", "u3", "alone"]
    assert list(headline_table(table.reset_index().query("kind == 'original'"))["checkpoint"]) == ["original"]
    far = table.reset_index().assign(perplexity=[9.0, *np.linspace(20, 13, len(table) - 1)])
    nearest = far[far["kind"] == "ours"].sort_values(["kl", "budget_bits"])
    assert headline_table(far)["checkpoint"].iloc[0] == nearest["checkpoint"].iloc[0]
    assert "code 1.50, en 0.25" in page
