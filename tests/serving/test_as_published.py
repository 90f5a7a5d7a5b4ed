"""Blocks that stay as published, beside others, on one rank and on two: the log-probabilities of `load_quantized`."""

from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from packed import pack
from published import FP8, PUBLISHED, compressed, fp8, is_expert, is_projection, packed_int, publish
from tiny import EXTRA, OPTIONS

TOKENS = torch.randint(3, 96, (4, 48), generator=torch.Generator().manual_seed(1))
WIDE = dict.fromkeys(("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 256)  # two ranks' 128
INT8 = compressed("pack-quantized", num_bits=8, type="int", strategy="channel")
PUBLISHERS: dict[str, Any] = {  # family, quantization_config, which weights, how
    "mxfp4": PUBLISHED["mxfp4"],
    "int4": PUBLISHED["pack-quantized"],
    "int8": ("qwen3_moe", INT8, is_expert, lambda weight: packed_int(weight, 8, weight.shape[1])),
    "fp8": ("qwen2_moe", FP8, is_projection, lambda weight: fp8(weight, (128, 128), "_scale_inv")),
}


@pytest.mark.parametrize(
    ("publisher", "scheme", "sizes", "options"),
    [
        ("mxfp4", "w4a16_mxfp4_published", {}, {}),
        ("int4", "w4a16_g32_published", EXTRA["deepseek_v3"], OPTIONS["deepseek_v3"]),
        ("int8", "w8a16_published", {}, {}),
        ("fp8", "w8a16_fp8_published", WIDE, {"tensor_parallel_size": 2}),
    ],
)
def test_published_blocks(
    publisher: str,
    scheme: str,
    sizes: dict[str, Any],
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PUBLISHED, publisher, PUBLISHERS[publisher])
    published, _ = publish(publisher, tmp_path, **sizes)
    folder = pack(published, tmp_path / "packed", engine.dealt((scheme, "w3a16_g32", scheme, "w16a16", "w4a16_g32")))
    expected = engine.expected(folder, TOKENS)
    if "tensor_parallel_size" in options:
        served, log = engine.run_alone(folder, TOKENS, tmp_path, **options)
        assert served is not None, log
    else:
        served = engine.served(folder, TOKENS, **options)
    assert (served - expected).abs().max() < 1e-4
