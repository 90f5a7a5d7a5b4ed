"""Sorting, gathering and quantizing tokens on a GPU, against torch on the CPU."""

import pytest
import torch

from mxmoe_steps.kernels import reference
from mxmoe_steps.kernels.launch import gather_tokens, sort_by_expert

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 60, 4), (77, 8, 2), (5000, 128, 8), (300, 1, 1)])
def test_rows_are_sorted_by_expert(tokens: int, experts: int, top_k: int) -> None:
    torch.manual_seed(tokens)
    chosen = torch.rand(tokens, experts).topk(top_k, dim=1).indices.int()
    routed = sort_by_expert(chosen.cuda(), experts)
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    assert torch.equal(routed.offsets.cpu(), torch.cat([torch.zeros(1), counts.cumsum(0)]).int())
    row = routed.row.cpu().long()
    assert torch.equal(row.sort().values, torch.arange(tokens * top_k))
    assert torch.equal(routed.source.cpu()[row], torch.arange(tokens * top_k, dtype=torch.int32) // top_k)
    by_row = torch.empty_like(chosen.flatten())
    by_row[row] = chosen.flatten()
    assert (by_row.diff() >= 0).all()


@pytest.mark.parametrize("operand", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("features", [64, 2048, 14336])
def test_gathered_tokens_are_those_of_the_reference_bit_for_bit(operand: str, features: int) -> None:
    torch.manual_seed(features)
    x = (torch.randn(200, features) * torch.logspace(-6, 6, 200)[:, None]).bfloat16()
    x[3] = 0
    source = torch.randint(0, 200, (517,), dtype=torch.int32)
    got = gather_tokens(x.cuda(), source.cuda(), operand)
    rows = x[source.long()]
    if operand == "bf16":
        assert torch.equal(got.values.cpu(), rows)
        return
    codes, scales = reference.quantize_tokens(rows, operand)
    assert got.scales is not None
    assert torch.equal(got.scales.cpu(), scales)
    assert torch.equal(got.values.cpu(), codes)
