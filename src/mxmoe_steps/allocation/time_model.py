"""The time of the expert layers under an allocation.

A layer is two GroupGEMM launches, gate+up of all experts and down of all experts. A launch takes

    launch_us + max(sum of tile times / P + (1 - 1/P) x longest tile in use, bytes / bandwidth)

with P multiprocessors: Graham's bound for list scheduling (1969, theorem 1) or the memory floor. Every term is
linear in the choices or a maximum over them, so the time of a model is a sum of maxima of linear functions.
Costs are expectations over sampled steps (`traffic`). The token tile follows from a block's row count.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.allocation.traffic import Traffic
from mxmoe_steps.errors import UserError
from mxmoe_steps.schemes import SHARED, Scheme, parse_scheme
from mxmoe_steps.tables import PROFILE, read_table

TILE_WEIGHTS = 128  # weight rows per tile
KSTEP = 128  # input features per k-step
LAUNCHES = 2  # gate+up, down
OUTPUT_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Profile:
    """Tile times of one GPU: per scheme [(tile_tokens, tile_us, kstep_us), ...] as float64 [C, 3]."""

    tiles: dict[Scheme, NDArray[np.float64]]
    sms: int
    bandwidth_gbs: float
    launch_us: float
    estimate: bool
    device: str

    def only_tile(self, tile_tokens: int) -> "Profile":
        """The same GPU with one token tile for every scheme (the paper: one tile per kernel)."""
        return replace(self, tiles={s: rows[rows[:, 0] == tile_tokens] for s, rows in self.tiles.items()})


def read_profile(path: str) -> Profile:
    """Read a PROFILE table."""
    table, facts = read_table(PROFILE, path)
    rows = np.stack([table.column(name).to_numpy() for name in ("tile_tokens", "tile_us", "kstep_us")], 1)
    names = np.array(table.column("scheme").to_pylist())
    tiles = {parse_scheme(name): rows[names == name] for name in sorted(set(names.tolist()))}
    for scheme, cells in tiles.items():
        if not (np.isfinite(cells).all() and (cells >= 0).all()):
            raise UserError(f"{path}: a time of {scheme} is negative or not finite; profile this GPU again")
    keys = ("sms", "bandwidth_gbs", "launch_us", "estimate", "device")
    return Profile(tiles, **{key: facts[key] for key in keys})


def timing_schemes(schemes: tuple[Scheme, ...], profile: Profile, time_as: dict[Scheme, Scheme]) -> list[Scheme]:
    """Whose kernel times each scheme: its own, the one `time_as` names, or that of `Scheme.kernel_scheme`."""
    kernels = []
    for scheme in schemes:
        kernel = time_as.get(scheme, scheme if scheme in profile.tiles else scheme.kernel_scheme)
        if kernel not in profile.tiles:
            raise UserError(
                f"scheme {scheme} has no kernel in the profile of {profile.device}, which times "
                f"{', '.join(map(str, sorted(profile.tiles)))}: drop it from the candidates, or say whose kernel to "
                f"count for it, e.g. --time-as {scheme}={min(profile.tiles)}"
            )
        kernels.append(kernel)
    return kernels


@dataclass(frozen=True)
class Times:
    """Expected times of B blocks under S schemes, microseconds, float64 [B, S].

    ``compute``: tile times / P; ``longest``: (1 - 1/P) x the block's tile; ``memory``: bytes / bandwidth.
    """

    compute: NDArray[np.float64]
    longest: NDArray[np.float64]
    memory: NDArray[np.float64]
    launch_us: float


def block_times(blocks: Blocks, kernels: list[Scheme], traffic: Traffic, profile: Profile) -> Times:
    """Times of every block under the kernels of S schemes for the sampled traffic."""
    layer_of = {layer: index for index, layer in enumerate(traffic.layers)}
    missing = sorted(set(blocks.layer.tolist()) - set(layer_of))
    if missing:
        raise UserError(f"the trace has no layer {missing[0]}, the losses do: trace and losses are of different models")
    experts = traffic.rows.shape[2]
    if blocks.expert.max() >= experts:
        raise UserError(
            f"the losses name expert {blocks.expert.max()}, the trace has {experts} experts: trace and losses are of "
            "different models"
        )
    for name in np.unique(blocks.layer).tolist():
        here = set(blocks.expert[blocks.layer == name].tolist())
        absent = sorted(set(range(experts)) - here)
        if absent:
            raise UserError(f"the losses lack expert {absent[0]} of layer {name}, which the trace has: calibrate it")
    layer = np.array([layer_of[name] for name in blocks.layer.tolist()])
    shared = blocks.expert == SHARED
    rows = np.where(shared[:, None], traffic.tokens, traffic.rows[layer, :, blocks.expert])  # [B, steps]
    weight = np.where(shared[:, None], 1 / rows.shape[1], traffic.weight[layer, :, blocks.expert])
    used = weight * (rows > 0)
    shape = (len(blocks), len(kernels))
    times = Times(np.zeros(shape), np.zeros(shape), np.zeros(shape), profile.launch_us)
    strips = -(-blocks.out_features // TILE_WEIGHTS)
    for column, scheme in enumerate(kernels):
        cells = profile.tiles[scheme]
        best = np.full(rows.shape, np.inf)  # time of the block's tiles in a step
        tile = np.zeros(rows.shape)  # time of one of them
        for tile_tokens, tile_us, kstep_us in cells:
            one = tile_us + kstep_us * blocks.in_features / KSTEP
            total = -(-rows // int(tile_tokens)) * (strips * one)[:, None]
            better = total < best
            best = np.where(better, total, best)
            tile = np.where(better, one[:, None], tile)
        times.compute[:, column] = (weight * best).sum(1) / profile.sms
        times.longest[:, column] = (1 - 1 / profile.sms) * np.where(rows > 0, tile, 0).max(1)
        weight_bytes = blocks.params * np.array([scheme.bits(int(k)) for k in blocks.in_features]) / 8
        row_bytes = blocks.in_features * scheme.act_bits / 8 + blocks.out_features * OUTPUT_BYTES
        moved = used.sum(1) * weight_bytes + (weight * rows).sum(1) * row_bytes
        times.memory[:, column] = moved / (profile.bandwidth_gbs * 1e3)
    return times


def layer_times(blocks: Blocks, times: Times, choice: NDArray[np.int64]) -> dict[int, float]:
    """Time of every layer, microseconds, when block b runs under scheme ``choice[b]`` (int64 [B])."""
    index = np.arange(len(blocks))
    compute, longest, memory = (part[index, choice] for part in (times.compute, times.longest, times.memory))
    result = {}
    for layer in np.unique(blocks.layer).tolist():
        result[layer] = 0.0
        for launch in range(LAUNCHES):
            of = (blocks.layer == layer) & (blocks.launch == launch)
            result[layer] += times.launch_us + max(compute[of].sum() + longest[of].max(), memory[of].sum())
    return result
