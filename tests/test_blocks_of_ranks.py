"""A rank's share of packed blocks: cuts put together give the whole, and what does not fit is named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mxmoe_steps.errors import UserError
from mxmoe_steps.inference.reading import reader
from mxmoe_steps.inference.vllm.blocks import Blocks, Share, place_in_experts, place_of
from mxmoe_steps.models.adapters import FAMILIES
from mxmoe_steps.models.families import ModelFolder
from mxmoe_steps.models.packed import linear_of
from mxmoe_steps.models.shards import packed_name
from mxmoe_steps.quantizers.grid import round_to_nearest
from mxmoe_steps.schemes import SHARED, parse_scheme

N, K = 128, 256


def whole(text: str, seed: int = 0, biased: bool = False) -> dict[str, torch.Tensor]:
    """A block [N, K] as a checkpoint stores it."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    scheme = parse_scheme(text)
    parts = {"weight": weight}
    if not scheme.is_original:
        made = round_to_nearest(weight, scheme)
        parts = (replace(made, scales=made.scales.float()) if scheme.scale_rows > 1 else made).tensors()
    return parts | ({"bias": weight[:, 0].clone()} if biased else {})


def share_of(text: str, block: str, rank: int, ranks: int, rotated: bool = False, biased: bool = False) -> Blocks:
    """What loads the share of one rank."""
    blocks = Blocks(3, Share(rank, ranks))
    blocks.add(5, block, parse_scheme(text), (N, K), rotated, biased)
    return blocks


def loaded(text: str, block: str, rank: int, ranks: int, biased: bool = False) -> nn.Module:
    blocks = share_of(text, block, rank, ranks, biased=biased)
    for part, tensor in whole(text, biased=biased).items():
        blocks.load(5, block, part, tensor)
    return linear_of(blocks.finish()[5, block], torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("block", ["gate", "up", "down"])
@pytest.mark.parametrize(
    "text",
    [
        *("w4a16_g128", "w3a16_g32", "w1a16_g64", "w8a16", "w2a16_g-1_sym", "w16a16"),
        *("w4a16_mxfp4_published", "w4a16_g32_published", "w8a16_published", "w8a16_g32_fp8_published"),
    ],
)
def test_ranks_together_compute_the_whole(text: str, block: str, ranks: int) -> None:
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(1))
    expected = loaded(text, block, 0, 1, biased=True)(x)
    shares = [loaded(text, block, rank, ranks, biased=True) for rank in range(ranks)]
    if block == "down":
        found = sum(share(part) for share, part in zip(shares, x.chunk(ranks, -1), strict=True))
    else:
        found = torch.cat([share(x) for share in shares], -1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "text", "ranks", "rotated", "why"),
    [
        ("down", "w4a16_g96", 2, False, "groups of 96 and the 128 input features of a rank do not nest"),
        ("down", "w4a16_g32", 64, False, "4 input features of a rank fill no whole bytes"),
        ("down", "w4a16_g32", 3, False, "256 features do not divide by 3 ranks"),
        ("down", "w4a16_g128", 2, True, "its inputs are rotated as a whole"),
        ("gate", "w8a16_g32_fp8_published", 8, False, "32 rows share scales, and the 16 .* cut through them"),
        ("down", "w8a16_g96_fp8_published", 2, False, "groups of 96 and the 128 input features of a rank do not nest"),
    ],
)
def test_what_cannot_be_cut(block: str, text: str, ranks: int, rotated: bool, why: str) -> None:
    with pytest.raises(UserError, match=rf"^layer 3: a {block} block .* {why}; use expert parallelism"):
        share_of(text, block, 0, ranks, rotated)


def test_gate_and_up_are_cut_rotated_or_not() -> None:
    share_of("w4a16_g96", "gate", 0, 2, rotated=True)


def test_a_missing_part_is_named() -> None:
    blocks = share_of("w4a16", "up", 0, 1)
    blocks.add(SHARED, "up", parse_scheme("w16a16"), (N, K), rotated=False)
    says = "for layer 3, expert 5, up: qweight, nor any other: .* reads its files past the quantization method"
    with pytest.raises(UserError, match=f"^no packed tensor has come {says}"):
        blocks.finish()
    blocks.load(SHARED, "up", "weight", torch.zeros(N, K))
    parts = whole("w4a16")
    blocks.load(5, "up", "qweight", parts["qweight"])
    with pytest.raises(UserError, match="lacks tensors: layer 3, expert 5, up: scales and 1 others are missing"):
        blocks.finish()
    with pytest.raises(UserError, match="layer 3, the shared expert, up: weight comes twice"):
        blocks.load(SHARED, "up", "weight", torch.zeros(N, K))


@pytest.mark.parametrize(
    ("part", "change", "why"),
    [
        ("qweight", lambda t: t[:, :-1], r"qweight is torch.uint8 \[128, 127\], expected torch.uint8 \[128, 128\]"),
        ("scales", lambda t: t.float(), r"scales is torch.float32 \[128, 2\], expected torch.bfloat16 \[128, 2\]"),
        ("weight", lambda t: t, "weight comes twice, or is no part of a block under w4a16_g128_asym"),
    ],
)
def test_a_part_that_does_not_fit_is_named(part: str, change: Any, why: str) -> None:
    blocks = share_of("w4a16", "up", 0, 1)
    tensor = change(whole("w4a16").get(part, torch.zeros(N, K)))
    with pytest.raises(UserError, match=f"layer 3, expert 5, up: {why}"):
        blocks.load(5, "up", part, tensor)


def test_a_part_comes_once() -> None:
    blocks = share_of("w16a16", "up", 0, 1)
    blocks.load(5, "up", "weight", whole("w16a16")["weight"])
    with pytest.raises(UserError, match="expert 5, up: weight comes twice"):
        blocks.load(5, "up", "weight", whole("w16a16")["weight"])


def test_scales_that_are_no_numbers_are_named() -> None:
    blocks = share_of("w4a16", "down", 0, 1)
    parts = whole("w4a16")
    parts["scales"][2, 1] = float("nan")
    for part, tensor in parts.items():
        blocks.load(5, "down", part, tensor)
    with pytest.raises(UserError, match="layer 3, expert 5, down: scales holds NaN"):
        list(reader(blocks.finish(), torch.device("cpu"))([[(5, "down")]]))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_names_of_packed_tensors_say_what_they_are(name: str) -> None:
    family = FAMILIES[name]
    folder = ModelFolder(Path("model"), family, {"model_type": name})
    for expert in (7, SHARED) if family.shared else (7,):
        for block in family.own_blocks:
            stored = packed_name(folder, 12, expert, block, "scales")
            for known in (stored, stored.removeprefix("model."), stored[stored.index("layers") :]):
                assert place_of(known, family, {12}) == (12, expert, block, "scales")
            assert place_of(stored, family, {11}) is None  # a layer of 16 bits
            ahead = stored[stored.index("layers") :]
            assert place_of(f"mtp.{ahead}", family, {12}) is place_of(f"model.mtp.{ahead}", family, {12}) is None
    for other in ("router.weight", "shared_mlp_gate.weight", "experts.gate_up_proj", "experts.3.gate.weight"):
        assert place_of(f"{family.moe_path(12)}.{other}", family, {12}) is None


def test_names_inside_of_experts() -> None:
    assert place_in_experts("13.up_proj.qweight") == (13, "up", "qweight")
    with pytest.raises(UserError, match=r"experts\.gate_up_proj is no part of a packed block"):
        place_in_experts("gate_up_proj")
