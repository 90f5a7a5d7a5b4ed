"""The losses of `calibrate`, measured expert by expert, against transformers' own MoE layer in float64 as a whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import block_weight, capture_tokens, make_checkpoint, moe_of
from safetensors.torch import load_file

from mxmoe_steps import calibrate
from mxmoe_steps.models.adapters import FAMILIES
from mxmoe_steps.models.families import open_model
from mxmoe_steps.models.loading import auto_class
from mxmoe_steps.quantizers.grid import from_tensors
from mxmoe_steps.schemes import SHARED, parse_scheme
from mxmoe_steps.tables import LOSSES, read_table

SCHEME = parse_scheme("w3a16_g32")


def output_of(moe: Any, family: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = tensors["hidden"].double()
    if not FAMILIES[family].moe:  # its router looks at other hidden states
        return moe.experts(hidden, tensors["ids"].long(), tensors["weights"].double())
    output = moe(hidden.unsqueeze(0))
    output = output[0] if isinstance(output, tuple) else output  # gpt_oss and llama4 return their router's scores, too
    return output.view(hidden.shape)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_losses_equal_forwards_of_the_whole_layer(family: str, tmp_path: Path) -> None:
    """Every block in turn gets its quantized weight; routers, shared experts and scaling factors are transformers'."""
    make_checkpoint(family, tmp_path / "model")
    tokens = torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(1))
    captured = capture_tokens(tmp_path / "model", tokens, tmp_path / "capture")
    options = {"quantizer": "gptq", "scheme": SCHEME.name, "damping": 0.01, "out": str(tmp_path / "out")}
    runtime = {"device": "cpu", "threads": 1, "seed": 0}
    paths = {"model": str(tmp_path / "model"), "capture": [str(tmp_path / "capture")]}
    calibrate.calibrate(calibrate.CalibrateOptions(**paths, **options, **runtime))
    losses = read_table(LOSSES, tmp_path / "out" / f"{SCHEME}.parquet")[0].to_pandas()
    packed = load_file(tmp_path / "out" / f"{SCHEME}.safetensors")

    # "eager": the grouped products of transformers have no float64
    model = (
        auto_class(open_model(tmp_path / "model"))
        .from_pretrained(tmp_path / "model", dtype=torch.float64, experts_implementation="eager")
        .requires_grad_(False)
    )
    assert set(losses["layer"]) == set(captured)
    assert set(losses["expert"]) == ({SHARED} if FAMILIES[family].shared else set()) | {0, 1, 2, 3}
    for row in losses.itertuples():
        if row.block == "gate" and not FAMILIES[family].gated:
            assert row.out_features == row.out_sq == row.fisher == 0
            continue
        moe, tensors = moe_of(model, family, row.layer), captured[row.layer]
        before = output_of(moe, family, tensors)
        weight = block_weight(moe, family, row.expert, row.block)
        original = weight.clone()
        prefix = f"{row.layer}.{row.expert}.{row.block}"
        parts = {part: packed[f"{prefix}.{part}"] for part in ("qweight", "scales", "zeros")}
        weight.copy_(from_tensors(SCHEME, row.in_features, parts).dequantize())
        change = output_of(moe, family, tensors) - before
        weight.copy_(original)
        assert row.out_sq == pytest.approx(float(change.square().sum()), rel=1e-4, abs=1e-12)
        fisher = 0.5 * (change * tensors["gradient"].double()).sum(-1).square().mean()
        assert row.fisher == pytest.approx(float(fisher), rel=1e-3, abs=1e-15)
    assert (losses["out_sq"] > 0).mean() > (0.9 if FAMILIES[family].gated else 0.6)
