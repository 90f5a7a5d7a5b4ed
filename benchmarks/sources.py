"""Time of dequantizing a tensor in every source format, one thread, beside a copy of as many bfloat16 numbers.

python benchmarks/sources.py
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mxmoe_steps.models.raw import tensors_of
from mxmoe_steps.models.sources.formats import source_formats
from mxmoe_steps.models.sources.tensor import Dequantized

ROWS, COLUMNS, EXPERTS = 2048, 7168, 4
REPEATS = 5


def compressed(format_: str) -> dict[str, Any]:
    """A ``quantization_config`` of compressed-tensors."""
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": {"weights": {}}}}


def codes(*shape: int) -> torch.Tensor:
    """Random bytes that are numbers in every format."""
    return torch.randint(0, 120, shape, dtype=torch.uint8)


def examples() -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Format -> its ``quantization_config`` and the parts of a weight."""
    n, k = ROWS, COLUMNS
    words, fp4, e4m3 = codes(n, k // 2).view(torch.int32), codes(n, k // 2), codes(n, k).view(torch.float8_e4m3fn)
    return {
        "fp8": (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"": e4m3, "_scale_inv": torch.rand(n // 128, k // 128)},
        ),
        "mxfp4": (
            {"quant_method": "mxfp4"},
            {"_blocks": codes(EXPERTS, n, k // 32, 16), "_scales": codes(EXPERTS, n, k // 32)},
        ),
        "pack-quantized": (
            compressed("pack-quantized"),
            {"_packed": words, "_scale": torch.rand(n, k // 32).bfloat16(), "_shape": torch.tensor([n, k])},
        ),
        "float-quantized": (compressed("float-quantized"), {"": e4m3, "_scale": torch.rand(n, 1)}),
        "nvfp4-pack-quantized": (
            compressed("nvfp4-pack-quantized"),
            {"_packed": fp4, "_scale": codes(n, k // 16).view(torch.float8_e4m3fn), "_global_scale": torch.rand(1)},
        ),
    }


def best_seconds(tensor: Any) -> float:
    """Of reading a tensor, the file in memory."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        tensor[...].clone()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    print("| format | shape | million weights a second |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        for name, (config, parts) in examples().items():
            save_file({f"x.weight{tail}": part for tail, part in parts.items()}, file)
            stored = tensors_of(file)
            (source,) = source_formats(config, Path("config.json"))
            ((weight, found),) = source.find(stored).items()
            tensor = Dequantized.of(weight, {part: stored[one] for part, one in found.items()}, source, "bfloat16")
            rate = torch.Size(tensor.shape).numel() / best_seconds(tensor) / 1e6
            print(f"| {name} | {list(tensor.shape)} | {rate:.0f} |", flush=True)
    plain = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    print(f"| a copy of bfloat16 | {list(plain.shape)} | {plain.numel() / best_seconds(plain) / 1e6:.0f} |")


if __name__ == "__main__":
    main()
