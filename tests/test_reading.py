"""Packed blocks on their way to a device: stacks are the blocks, whatever their parts are views of."""

from pathlib import Path

import pytest
import torch
from kernel_weights import random_weight
from safetensors import safe_open
from safetensors.torch import save_file

from mxmoe_steps.errors import UserError
from mxmoe_steps.inference.reading import reader
from mxmoe_steps.models.packed import StoredBlock
from mxmoe_steps.quantizers.grid import QuantizedWeight
from mxmoe_steps.schemes import parse_scheme

SCHEMES = ("w4a16", "w3a16", "w8a8_fp8", "w4a16_mxfp4", "w2a16_g-1_sym", "w16a16")
N, K, EXPERTS = 24, 256, 11
CPU = torch.device("cpu")


def weights_of(text: str) -> list[QuantizedWeight | torch.Tensor]:
    if parse_scheme(text).is_original:
        return list(torch.randn(EXPERTS, N, K, generator=torch.Generator().manual_seed(0)).bfloat16())
    return [random_weight(text, EXPERTS, N, K)[expert] for expert in range(EXPERTS)]


def parts_of(weight: QuantizedWeight | torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": weight} if isinstance(weight, torch.Tensor) else weight.tensors()


def stored(text: str, expert: int, parts: dict[str, torch.Tensor]) -> StoredBlock:
    return StoredBlock(f"layer 3, expert {expert}, up", parse_scheme(text), N, K, False, parts)


@pytest.mark.parametrize("text", SCHEMES)
def test_batches_are_the_blocks_in_order(text: str, tmp_path: Path) -> None:
    """From a mapped file, as views of wider tensors, and from memory in turn."""
    weights = weights_of(text)
    file = tmp_path / "model.safetensors"
    named = {f"{e}.{name}": part for e, weight in enumerate(weights) for name, part in parts_of(weight).items()}
    save_file(named, file)
    blocks = {}
    with safe_open(file, "pt") as opened:
        for expert, weight in enumerate(weights):
            parts = parts_of(weight)
            if expert % 3 == 0:
                parts = {name: opened.get_tensor(f"{expert}.{name}") for name in parts}
            elif expert % 3 == 1:
                parts = {name: torch.cat([part, part], 1)[:, : part.shape[1]] for name, part in parts.items()}
            blocks[expert, "up"] = stored(text, expert, parts)
    batches = [[(e, "up") for e in some] for some in ((3, 0, 1), (2,), (4, 5, 6, 7, 8), (10, 9), (0,), (1,))]
    stacks = list(reader(blocks, CPU)(batches))
    assert len(stacks) == len(batches)
    for batch, stack in zip(batches, stacks, strict=True):
        assert len(stack if isinstance(stack, torch.Tensor) else stack.codes) == len(batch)
        for number, (expert, _) in enumerate(batch):
            found = stack[number]
            for name, part in parts_of(weights[expert]).items():
                assert torch.equal(parts_of(found)[name], part)


@pytest.mark.parametrize(
    ("text", "part", "value"),
    [
        ("w4a16", "scales", float("nan")),
        ("w4a16", "scales", 0.0),
        ("w4a16", "zeros", -float("inf")),
        ("w8a8_fp8", "qweight", 0xFF),
        ("w4a16_mxfp4", "scales", 0xFF),
        ("w16a16", "weight", float("inf")),
    ],
)
def test_a_part_that_means_no_numbers_is_named(text: str, part: str, value: float) -> None:
    blocks = {(e, "up"): stored(text, e, parts_of(weight)) for e, weight in enumerate(weights_of(text))}
    blocks[7, "up"].parts[part][5, 0] = value
    assert list(reader(blocks, CPU)([[(6, "up"), (8, "up")]]))
    with pytest.raises(UserError, match=f"^layer 3, expert 7, up: {part} holds NaN or infinity, or a scale that is"):
        list(reader(blocks, CPU)([[(6, "up")], [(8, "up"), (7, "up")]]))
