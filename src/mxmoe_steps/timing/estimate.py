"""Tile times from a GPU's data sheet, for GPUs that nothing was measured on.

Where kernels of ``mma.sync`` run, tensor cores reach the shares of their peak that tiles of the same kernels reached on
an H100 (docs/gpus.md). Elsewhere they reach all of it.
"""

from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architectures import PHASE_ROWS, PHASES, for_target
from mxmoe_steps.kernels.mma.architecture import GPUS as MMA_GPUS
from mxmoe_steps.records import STRICT, Count, Name, Positive, Quantity, read_record
from mxmoe_steps.schemes import Scheme

HARDWARE = Path(__file__).parent / "profiles" / "hardware.json"
TILE_TOKENS = (8, 16, 32, 64, 128, 256)
MIN_TENSOR_TOKENS = 16  # a narrower product keeps the tensor cores busy just as long
# Tokens of a tile -> share of the data sheet's peak, of kernels that multiply rows as they are, or decoded or grouped
# codes: Qwen1.5-MoE, gate+up of 8192 tokens in docs/measurements/mma.json, by the largest tile of each phase
PEAK_SHARES = {
    ("bf16", False): {8: 0.072, 64: 0.352, 128: 0.412},
    ("bf16", True): {8: 0.110, 64: 0.391},
    ("int8", False): {8: 0.067, 64: 0.337, 128: 0.355},
    ("int8", True): {8: 0.063, 48: 0.266},
}


class _DataSheet(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]

    arch: Name
    bandwidth_gbs: Positive
    device: Name
    l2_gbs: Positive
    launch_us: Quantity
    peak_tflops: dict[Literal["bf16", "fp8", "int8", "int4"], Positive]
    sms: Count
    source: Name
    tile_us: Positive


def data_sheets() -> dict[str, Any]:
    """Name -> data sheet of the GPUs in `HARDWARE`."""
    return read_record(HARDWARE, dict[Name, _DataSheet], "correct it")


def read_hardware(name: str) -> dict[str, Any]:
    """Data sheet of a known GPU; `UserError` lists the known ones."""
    known = data_sheets()
    if name not in known:
        raise UserError(f"hardware {name!r} is not known; known are {', '.join(sorted(known))} (see {HARDWARE})")
    sheet: dict[str, Any] = known[name]
    return sheet


def measured_file(name: str) -> Path | None:
    """Measurements of a named GPU, if they ship."""
    file = HARDWARE.with_name(f"{name}.parquet")
    return file if file.is_file() else None


def tokens_at_peak(scheme: Scheme, tile_tokens: int, hardware: dict[str, Any]) -> float:
    """Tokens that the GPU's tensor cores multiply at their peak while they multiply a tile's.

    Times of tiles between measured ones lie on a line; larger ones take the last share.
    """
    if for_target(hardware["arch"]) not in MMA_GPUS:
        return max(tile_tokens, MIN_TENSOR_TOKENS)
    by_parts = scheme.act_bits < 8 or scheme.weight_bits < scheme.act_bits
    shares = PEAK_SHARES["bf16" if scheme.act_bits == 16 else "int8", by_parts]
    if tile_tokens >= max(shares):
        return tile_tokens / shares[max(shares)]
    below = max(tokens for tokens in shares if tokens <= tile_tokens)
    above = min(tokens for tokens in shares if tokens > tile_tokens)
    part = (tile_tokens - below) / (above - below)
    return (1 - part) * below / shares[below] + part * above / shares[above]


def roofline_kstep_us(scheme: Scheme, tile_height: int, tile_tokens: int, hardware: dict[str, Any]) -> float:
    """Time of 128 input features of one tile on one SM: tensor cores or the L2 cache, whichever is slower.

    The tensor cores do 2 x rows x 128 x `tokens_at_peak` operations at 1/SMs of the GPU's peak; the L2 cache delivers
    the stored weights and the activations of the step at 1/SMs of its bandwidth.
    """
    peaks = hardware["peak_tflops"]
    if scheme.compute_type not in peaks:
        raise UserError(
            f"scheme {scheme}: {hardware['device']} has no {scheme.compute_type} tensor cores, only {', '.join(peaks)}"
        )
    kind = "int4" if scheme.act_bits == 4 and "int4" in peaks else scheme.compute_type
    operations = 2 * tile_height * 128 * tokens_at_peak(scheme, tile_tokens, hardware)
    compute_us = operations * hardware["sms"] / (peaks[kind] * 1e6)
    loaded = tile_height * 128 * scheme.bits(128) / 8 + tile_tokens * 128 * scheme.act_bits / 8
    return float(max(compute_us, loaded * hardware["sms"] / (hardware["l2_gbs"] * 1e3)))


def estimate_profile(schemes: list[Scheme], hardware: dict[str, Any]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns and facts of a `tables.PROFILE` table from a data sheet: a perfect machine but for `tokens_at_peak`, and
    Graham's tail."""
    kernels = sorted({scheme.kernel_scheme for scheme in schemes})
    cells = [(phase, scheme, tile) for phase in PHASES for scheme in kernels for tile in TILE_TOKENS]
    columns: dict[str, list[Any]] = {
        "phase": [phase for phase, _, _ in cells],
        "scheme": [scheme.name for _, scheme, _ in cells],
        "tile_tokens": [tile for _, _, tile in cells],
        "tile_us": [float(hardware["tile_us"]) for _ in cells],
        "kstep_us": [roofline_kstep_us(scheme, PHASE_ROWS[phase], tile, hardware) for phase, scheme, tile in cells],
        "spread": [0.0 for _ in cells],
    }
    facts = {key: hardware[key] for key in ("device", "arch", "sms", "bandwidth_gbs", "launch_us", "source")}
    ideal = {"loop_launch_us": 0.0, "loop_tile_us": 0.0, "tail": 1 - 1 / hardware["sms"], "exposed": 0.0}
    return columns, {**facts, **ideal, "activation_gbs": hardware["bandwidth_gbs"], "estimate": True}
