"""Top-k of compiled routers against `torch.topk`."""

import pytest
import torch

from mxmoe_steps.inference.top_k import MOST_COLUMNS, TopKByMaxima, top_k_by_maxima


@pytest.mark.parametrize(("tokens", "columns", "k"), [(1, 60, 4), (64, 128, 8), (7, 512, 10), (3, 1, 1), (5, 4, 4)])
def test_is_that_of_torch_on_random_values(tokens: int, columns: int, k: int) -> None:
    values = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(columns)).softmax(-1)
    ours, theirs = top_k_by_maxima(values, k), torch.topk(values, k)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_columns_differ_where_values_do_not() -> None:
    """Routers by groups mask experts with minus infinity or zero, and few may be left."""
    values = torch.tensor([[-torch.inf] * 6, [0.0] * 6, [-torch.inf, 2.0, -torch.inf, 2.0, -0.0, 0.0], [torch.nan] * 6])
    found, columns = top_k_by_maxima(values, 4)
    assert all(len(set(row)) == 4 for row in columns.tolist())
    assert torch.equal(values.gather(1, columns).nan_to_num(7), found.nan_to_num(7))
    assert torch.equal(found.nan_to_num(7), torch.topk(values, 4).values.nan_to_num(7))
    assert columns[1].tolist() == [0, 1, 2, 3]


def route(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A router in groups: two of four groups by their two best experts, then experts of those."""
    scores = torch.nn.functional.linear(hidden, weight).sigmoid()
    groups = scores.view(-1, 4, 6).topk(2, dim=-1)[0].sum(-1)
    kept = torch.zeros_like(groups).scatter_(1, torch.topk(groups, k=2, dim=-1, sorted=False)[1], 1.0)
    masked = scores.masked_fill(kept.repeat_interleave(6, -1) == 0, 0.0)
    lowest = torch.topk(scores, 3, largest=False)
    wide = torch.topk(hidden.repeat(1, MOST_COLUMNS), 2)
    return *torch.topk(masked, 4), *lowest, *wide, *torch.topk(scores.double(), 2)


@torch.no_grad()
def test_a_compiled_router_chooses_as_the_uncompiled_one() -> None:
    def within(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with TopKByMaxima():
            return route(hidden, weight)

    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator) for n in (9, 24))
    expected = route(hidden, weight)
    for found in (within(hidden, weight), torch.compile(within, fullgraph=True)(hidden, weight)):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
