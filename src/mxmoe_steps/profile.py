"""profile: what one output tile of a GroupGEMM costs on a GPU, per scheme and token tile.

Writes a table of tile times; `frontier` turns them into the time of a layer. Without a GPU the times are a
roofline estimate from the data sheet of a named GPU (resources/profiles/hardware.json), and every result
that uses them says so.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from mxmoe_steps.arguments import parser_for
from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.schemes import Scheme, parse_scheme

HARDWARE = Path(__file__).parents[2] / "resources" / "profiles" / "hardware.json"
TILE_TOKENS = (8, 16, 32, 64, 128, 256)
TILE_WEIGHTS = 128  # weight rows of a tile: two 64-row warpgroup products on Hopper
MIN_TENSOR_TOKENS = 16  # a narrower product keeps the tensor cores busy just as long


def read_hardware(name: str) -> dict[str, Any]:
    """Data sheet of a known GPU; `UserError` lists the known ones."""
    known: dict[str, dict[str, Any]] = json.loads(HARDWARE.read_text(encoding="utf-8"))
    if name not in known:
        raise UserError(f"hardware {name!r} is not known; known are {', '.join(sorted(known))} (see {HARDWARE})")
    return known[name]


def roofline_kstep_us(scheme: Scheme, tile_tokens: int, hardware: dict[str, Any]) -> float:
    """Time of 128 input features of one tile on one SM: tensor cores or the L2 cache, whichever is slower.

    The tensor cores do 2 x 128 x 128 x tokens operations at 1/SMs of the GPU's peak; the L2 cache delivers
    the stored weights and the activations of the step at 1/SMs of its bandwidth.
    """
    peaks = hardware["peak_tflops"]
    if scheme.compute_type not in peaks:
        raise UserError(
            f"scheme {scheme}: {hardware['device']} has no {scheme.compute_type} tensor cores, only {', '.join(peaks)}"
        )
    operations = 2 * TILE_WEIGHTS * 128 * max(tile_tokens, MIN_TENSOR_TOKENS)
    compute_us = operations * hardware["sms"] / (peaks[scheme.compute_type] * 1e6)
    loaded = TILE_WEIGHTS * 128 * scheme.bits(128) / 8 + tile_tokens * 128 * scheme.act_bits / 8
    return float(max(compute_us, loaded * hardware["sms"] / (hardware["l2_gbs"] * 1e3)))


def estimate_profile(schemes: list[Scheme], hardware: dict[str, Any]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns and facts of a `tables.PROFILE` table from a data sheet."""
    kernels = sorted({scheme.kernel_scheme for scheme in schemes})
    cells = [(scheme, tile) for scheme in kernels for tile in TILE_TOKENS]
    columns: dict[str, list[Any]] = {
        "scheme": [scheme.name for scheme, _ in cells],
        "tile_tokens": [tile for _, tile in cells],
        "tile_us": [float(hardware["tile_us"]) for _ in cells],
        "kstep_us": [roofline_kstep_us(scheme, tile, hardware) for scheme, tile in cells],
    }
    facts = {key: hardware[key] for key in ("device", "arch", "sms", "bandwidth_gbs", "launch_us", "source")}
    return columns, {**facts, "estimate": True}


def profile(args: argparse.Namespace) -> None:
    """Write the profile of ``args.hardware``."""
    from mxmoe_steps.tables import PROFILE, write_table

    schemes = [parse_scheme(text) for text in args.schemes]
    columns, facts = estimate_profile(schemes, read_hardware(args.hardware))
    write_table(PROFILE, args.out, columns, facts)


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    parser.add_argument("--hardware", required=True, help="a GPU of resources/profiles/hardware.json, e.g. h100")
    parser.add_argument("--schemes", nargs="+", required=True, metavar="SCHEME")
    parser.add_argument("--out", required=True, help="parquet file to write")
    profile(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
