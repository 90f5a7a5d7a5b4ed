"""The step `time` on a GPU, on the embedded model under a made-up trace."""

import statistics
from pathlib import Path

import pytest
from gpu_marks import needs_kernels
from packed import pack
from synthetic import write_trace

from mxmoe_steps.errors import UserError
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.identity import fingerprint
from mxmoe_steps.tables import TIMES, read_table
from mxmoe_steps.time import TimeOptions, time

pytestmark = needs_kernels

MODEL = Path(__file__).parents[2] / "resources" / "demo-moe"
SCHEMES = {"w4": ("w4a16",) * 3, "mixed": ("w4a16", "w4a16", "w8a8_fp8")}


def test_every_layer_of_every_checkpoint_is_timed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = open_model(MODEL)
    folders = []
    for name, schemes in SCHEMES.items():
        made = pack(MODEL, tmp_path / name, lambda layer, _, schemes=schemes: ("w4a4",) * 3 if layer == 4 else schemes)
        folders.append(made.rename(tmp_path / f"checkpoint-{name}"))
    trace = write_trace(
        tmp_path / "trace", layers=6, experts=source.experts, top_k=2, texts=("web",), model=fingerprint(source)
    )
    settings = {"model": str(MODEL), "checkpoints": folders, "trace": trace, "traffic_text": "web", "rounds": 3}
    options = TimeOptions(**settings, tokens=[1, 300], steps=2, out=tmp_path / "times.parquet")
    time(options)
    rows, facts = read_table(TIMES, options.out)
    assert facts["steps"] == 2
    seen: dict[tuple[str, int, int, int], dict[str, float]] = {}
    for row in rows.to_pylist():
        assert len(row["us"]) == 3
        place = (row["checkpoint"], row["layer"], row["tokens"], row["step"])
        seen.setdefault(place, {})[row["stage"]] = statistics.median(row["us"])
    assert not [place for place in seen if place[1] == 4]  # no kernel for its scheme
    for layer in (0, 1, 2, 3, 5):
        for tokens in (1, 300):
            for step in range(2):
                original = seen["original", layer, tokens, step]
                assert set(original) == ({"grouped_mm", "batched_mm"} if tokens == 1 else {"grouped_mm"})
                for name in SCHEMES:
                    stages = seen[f"checkpoint-{name}", layer, tokens, step]
                    apart = sum(us for stage, us in stages.items() if stage != "layer")
                    # launches overlap
                    assert 0.3 * apart < stages["layer"] < 1.2 * apart, (name, layer, tokens, stages)
                    assert ("swiglu" in stages) == (name == "mixed")
    said = capfd.readouterr().err
    assert "time: layer 5 (6 of 6)" in said
    assert said.count("layer 4 is not timed") == 2
    with pytest.raises(UserError, match=r"no text 'code' in this trace"):
        time(options.model_copy(update={"traffic_text": "code"}))
