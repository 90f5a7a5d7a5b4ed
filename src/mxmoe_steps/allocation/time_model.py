"""The time of the expert layers under an allocation.

A layer is two GroupGEMM launches, gate+up of all experts and down of all experts. A launch takes

    launch_us + loop_launch_us F + max(W + tail x longest tile in use, bytes / bandwidth + exposed W)
    W = sum over tiles of (its time + loop_tile_us (F - F of its own scheme)) / P

with P multiprocessors: Graham's bound for list scheduling (1969, theorem 1; there the tail is 1 - 1/P), or the memory
floor and the part of the compute that it does not hide. A kernel carries F main loops, one per scheme and token tile.
Every term is linear in the choices or a maximum over them, so the time of a model is a sum of maxima of linear
functions. `profile` fits the constants (docs/profile.md). Costs are expectations over sampled steps (`traffic`).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.allocation.blocks import Blocks
from mxmoe_steps.allocation.traffic import Traffic
from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architectures import DEFAULT, PHASE_ROWS, PHASES
from mxmoe_steps.kernels.codes.format import HALF_ROWS
from mxmoe_steps.schemes import SHARED, Scheme, parse_scheme
from mxmoe_steps.tables import PROFILE, read_table

KSTEP = 128  # input features per k-step
LAUNCHES = 2  # gate+up, down
OUTPUT_BYTES = 2  # bfloat16
CONSTANTS = ("launch_us", "loop_launch_us", "loop_tile_us", "tail", "exposed", "bandwidth_gbs")


@dataclass(frozen=True)
class Profile:
    """Times of one GPU.

    ``tiles``: per (phase, scheme) rows of (tile_tokens, tile_us, kstep_us), ascending, float64 [C, 3]; the other
    numbers are the constants of the module's docstring.
    """

    tiles: dict[tuple[str, Scheme], NDArray[np.float64]]
    sms: int
    launch_us: float
    loop_launch_us: float
    loop_tile_us: float
    tail: float
    exposed: float
    bandwidth_gbs: float
    estimate: bool
    device: str

    @property
    def schemes(self) -> list[Scheme]:
        """Schemes with a kernel."""
        return sorted({scheme for _, scheme in self.tiles})

    def loops(self, phase: str, schemes: Collection[Scheme]) -> int:
        """Main loops of the kernel that carries ``schemes``."""
        return sum(len(self.tiles[phase, scheme]) for scheme in set(schemes))

    def shared_tiles(self, phases: Collection[str], schemes: Collection[Scheme]) -> list[int]:
        """Token tiles that every one of ``schemes`` has in kernels of all ``phases``; `UserError` if there is none."""
        cells = (self.tiles[phase, scheme] for phase in phases for scheme in schemes)
        shared = set.intersection(*({int(tokens) for tokens in mine[:, 0]} for mine in cells))
        if not shared:
            raise UserError(
                f"--shared-tile: {' and '.join(phases)} kernels of these schemes have no token tile in common at this"
                " number of tokens: leave it out, or choose another number"
            )
        return sorted(shared)

    def only_tile(self, tile_tokens: int) -> "Profile":
        """The same GPU with one token tile for every scheme (the paper: one tile per kernel)."""
        return replace(self, tiles={key: rows[rows[:, 0] == tile_tokens] for key, rows in self.tiles.items()})


def profile_of(columns: dict[str, NDArray[np.generic]], facts: dict[str, object]) -> Profile:
    """From the columns and facts of a PROFILE table."""
    rows = np.stack([np.asarray(columns[name], np.float64) for name in ("tile_tokens", "tile_us", "kstep_us")], 1)
    keys = list(zip(columns["phase"], columns["scheme"], strict=True))
    tiles = {}
    for phase, name in sorted({(str(phase), str(name)) for phase, name in keys}):
        mine = rows[[key == (phase, name) for key in keys]]
        tiles[phase, parse_scheme(name)] = mine[mine[:, 0].argsort()]
    return Profile(tiles, **{key: facts[key] for key in ("sms", *CONSTANTS, "estimate", "device")})  # type: ignore[arg-type]


def read_profile(path: str) -> Profile:
    """Read a PROFILE table; `UserError` unless every scheme has kernels of all phases."""
    table, facts = read_table(PROFILE, path)
    profile = profile_of({name: np.array(table.column(name).to_pylist()) for name in table.column_names}, facts)
    wrong = set(profile.tiles) ^ {(phase, scheme) for phase in PHASES for scheme in profile.schemes}
    if wrong:
        phase, scheme = min(wrong)
        raise UserError(f"{path}: {scheme} has no times in phase {phase}, or there is no such phase; run profile again")
    return profile


def timing_schemes(schemes: tuple[Scheme, ...], profile: Profile, time_as: dict[Scheme, Scheme]) -> list[Scheme]:
    """Whose kernel times each scheme: the one `time_as` names, its own, or the one that runs it."""
    kernels = []
    for scheme in schemes:
        counted = time_as.get(scheme, scheme)
        runs_as = (counted, counted.kernel_scheme) if profile.estimate else counted.runs_as
        kernel = next((one for one in runs_as if one in profile.schemes), None)
        if kernel is None:
            raise UserError(
                f"scheme {scheme} has no kernel in the profile of {profile.device}, which times "
                f"{', '.join(map(str, profile.schemes))}: drop it from the candidates, or say whose kernel to "
                f"count for it, e.g. --time-as {scheme}={profile.schemes[0]}"
            )
        kernels.append(kernel)
    return kernels


@dataclass(frozen=True)
class Times:
    """Expected times of B blocks under S schemes, microseconds, float64 [B, S].

    ``compute``: the block's part of W; ``longest``: tail x its longest tile; ``memory``: bytes / bandwidth + exposed
    x its part of W. ``launch_us`` [2, S]: constant time of a gate+up and a down launch whose blocks take this scheme.
    """

    compute: NDArray[np.float64]
    longest: NDArray[np.float64]
    memory: NDArray[np.float64]
    launch_us: NDArray[np.float64]

    def of(self, blocks: NDArray[np.bool_]) -> "Times":
        """Times of some of the blocks."""
        return Times(self.compute[blocks], self.longest[blocks], self.memory[blocks], self.launch_us)


def tile_counts(rows: NDArray[np.int64], sizes: NDArray[np.float64]) -> NDArray[np.int64]:
    """Token tiles of each size, [..., C], that the kernels cut ``rows`` [...] into: as many of the largest as fit, and
    for the rest the smallest that holds it. ``sizes`` ascend."""
    whole, rest = np.divmod(rows, int(sizes[-1]))
    counts = np.zeros((*rows.shape, len(sizes)), np.int64)
    counts[..., -1] = whole
    np.add.at(counts, (*np.nonzero(rest), np.searchsorted(sizes, rest[rest > 0])), 1)
    return counts


def block_work(
    rows: NDArray[np.int64],
    out_features: NDArray[np.int64],
    in_features: NDArray[np.int64],
    cells: NDArray[np.float64],
    extra_us: float,
    tile_rows: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Time of all tiles and of the longest tile of blocks, both [B, steps]; ``rows`` [B, steps], features [B].

    ``cells`` as in `Profile.tiles`; every tile takes ``extra_us`` more and holds ``tile_rows`` rows of weights.
    """
    counts = tile_counts(rows, cells[:, 0])  # [B, steps, C]
    one = cells[:, 1] + extra_us + cells[:, 2] * (in_features / KSTEP)[:, None]  # [B, C]
    strips = -(-out_features // tile_rows)
    work = (counts * one[:, None]).sum(2) * strips[:, None]
    return work, np.where(counts > 0, one[:, None], 0.0).max(2)


def bytes_moved(
    rows: NDArray[np.int64], out_features: NDArray[np.int64], in_features: NDArray[np.int64], scheme: Scheme
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bytes of the weights of blocks [B], moved if there are rows, and of one row's activations in and out [B]."""
    bits = np.array([scheme.bits(int(features)) for features in in_features])
    weights = out_features * in_features * bits / 8
    return weights, in_features * scheme.act_bits / 8 + out_features * OUTPUT_BYTES


def by_warp(schemes: Iterable[Scheme]) -> bool:
    """Whether all formats of the kernel that carries ``schemes`` are `kernels.formats.Format.by_warp`."""
    return all(scheme.weight_bits < scheme.act_bits and scheme.compute_type != "fp8" for scheme in schemes)


def cut_shared(blocks: Blocks) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pieces that every block runs as, and output and input features of a piece, int64 [B].

    The kernels cut a shared expert into experts of the routed width (`kernels.plan`).
    """
    routed = blocks.expert != SHARED
    pieces = np.ones(len(blocks), np.int64)
    out, inner = blocks.out_features.copy(), blocks.in_features.copy()
    for kind in np.unique(blocks.kind):
        for layer in np.unique(blocks.layer[~routed & (blocks.kind == kind)]):
            here = (blocks.layer == layer) & (blocks.kind == kind)
            shape = {(int(n), int(k)) for n, k in zip(out[here & routed], inner[here & routed], strict=True)}
            mine = here & ~routed
            if len(shape) == 1:
                n, k = shape.pop()
                count, rest = divmod(int(out[mine][0] * inner[mine][0]), n * k)
                if not rest and count > 1:
                    pieces[mine], out[mine], inner[mine] = count, n, k
    return pieces, out, inner


def step_phases(blocks: Blocks, traffic: Traffic, carried: Collection[Scheme], sms: int) -> tuple[str, ...]:
    """Phases of the kernels that run the gate+up and the down launches of steps of this size and carry ``carried``.

    Shapes are the first layer's.
    """
    rows, experts = int(np.median(traffic.rows.sum(2))), traffic.rows.shape[2]
    blocks = blocks[blocks.layer == blocks.layer[0]]
    pieces, out, _ = cut_shared(blocks)
    slices = int(pieces[blocks.expert == SHARED].max(initial=0))
    one = blocks.expert == blocks.expert.max()
    phases = []
    for launch in range(LAUNCHES):
        strips = int((-(-out[one & (blocks.launch == launch)] // HALF_ROWS)).sum())
        phases.append(DEFAULT.phase_for(rows, experts, slices, strips, sms, by_warp(carried)))
    return tuple(phases)


def block_times(
    blocks: Blocks,
    kernels: list[Scheme],
    traffic: Traffic,
    profile: Profile,
    carried: Collection[Scheme] | None = None,
) -> Times:
    """Times of every block under the kernels of S schemes for the sampled traffic.

    ``carried``: schemes of the kernel that runs the launches; by default each scheme is timed alone in its own.
    """
    rows, weight = _rows_and_weights(blocks, traffic)
    used = weight * (rows > 0)
    pieces, out, inner = cut_shared(blocks)
    shape = (len(blocks), len(kernels))
    times = Times(np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros((LAUNCHES, len(kernels))))
    for column, scheme in enumerate(kernels):
        within = carried or [scheme]
        for launch, phase in enumerate(step_phases(blocks, traffic, within, profile.sms)):
            of = blocks.launch == launch
            own, loops = profile.loops(phase, [scheme]), profile.loops(phase, within)
            extra_us = profile.loop_tile_us * (loops - own)
            cells = profile.tiles[phase, scheme]
            work, longest = block_work(rows[of], out[of], inner[of], cells, extra_us, PHASE_ROWS[phase])
            times.launch_us[launch, column] = profile.launch_us + profile.loop_launch_us * loops
            times.compute[of, column] = pieces[of] * (weight[of] * work).sum(1) / profile.sms
            times.longest[of, column] = profile.tail * longest.max(1)
        weight_bytes, row_bytes = bytes_moved(rows, out, inner, scheme)
        moved = pieces * (used.sum(1) * weight_bytes + (weight * rows).sum(1) * row_bytes)
        times.memory[:, column] = moved / (profile.bandwidth_gbs * 1e3) + profile.exposed * times.compute[:, column]
    return times


def _rows_and_weights(blocks: Blocks, traffic: Traffic) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows of every block in every sampled step and the step's weight, [B, steps]; `UserError` if models differ."""
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
    return rows, weight


def layer_times(blocks: Blocks, times: Times, choice: NDArray[np.int64]) -> dict[int, float]:
    """Time of every layer, microseconds, when block b runs under scheme ``choice[b]`` (int64 [B])."""
    index = np.arange(len(blocks))
    compute, longest, memory = (part[index, choice] for part in (times.compute, times.longest, times.memory))
    result = {}
    for layer in np.unique(blocks.layer).tolist():
        result[layer] = 0.0
        for launch in range(LAUNCHES):
            of = (blocks.layer == layer) & (blocks.launch == launch)
            result[layer] += times.launch_us[launch, choice[of]].max()
            result[layer] += max(compute[of].sum() + longest[of].max(), memory[of].sum())
    return result
