"""The profile of one GPU, read and checked: tile times and constants of the time model."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.architectures import DEFAULT, PHASES, for_target
from mxmoe_steps.schemes import Scheme, parse_scheme
from mxmoe_steps.tables import PROFILE, read_table
from mxmoe_steps.timing.model import CONSTANTS


@dataclass(frozen=True)
class Profile:
    """Times of one GPU.

    ``tiles``: of every (phase, scheme) its C tiles (tile_tokens, tile_us, kstep_us), ascending, float64 [C, 3]; the
    other numbers are the constants of `timing.model`. ``architecture``: whose rule picks the phase of a launch.
    """

    tiles: dict[tuple[str, Scheme], NDArray[np.float64]]
    sms: int
    launch_us: float
    loop_launch_us: float
    loop_tile_us: float
    tail: float
    exposed: float
    bandwidth_gbs: float
    activation_gbs: float
    estimate: bool
    device: str
    architecture: Architecture = DEFAULT  # of GPUs without kernels, too

    @property
    def schemes(self) -> list[Scheme]:
        """Schemes with a kernel."""
        return sorted({scheme for _, scheme in self.tiles})

    def memory_us(
        self, weight_bytes: NDArray[np.float64], activation_bytes: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Microseconds that bytes take to move, M of `timing.model`, elementwise."""
        return weight_bytes / (self.bandwidth_gbs * 1e3) + activation_bytes / (self.activation_gbs * 1e3)

    def loops(self, phase: str, schemes: Collection[Scheme]) -> int:
        """Main loops of the kernel that carries ``schemes``."""
        return sum(len(self.tiles[phase, scheme]) for scheme in set(schemes))

    def common_tiles(self, phases: Collection[str], schemes: Collection[Scheme]) -> list[int]:
        """Tokens of the tiles that all ``schemes`` have in the kernels of all ``phases``; `UserError` without any."""
        cells = (self.tiles[phase, scheme] for phase in phases for scheme in schemes)
        common = set.intersection(*({int(tokens) for tokens in tiles[:, 0]} for tiles in cells))
        if not common:
            raise UserError(
                f"--shared-tile: {' and '.join(phases)} kernels of these schemes have no token tile in common at this"
                " number of tokens: leave it out, or choose another number"
            )
        return sorted(common)

    def only_tile(self, tile_tokens: int) -> "Profile":
        """The same GPU with one token tile for every scheme (the paper: one tile per kernel)."""
        return replace(self, tiles={key: cells[cells[:, 0] == tile_tokens] for key, cells in self.tiles.items()})


def profile_of(columns: dict[str, NDArray[np.generic]], facts: dict[str, object]) -> Profile:
    """From the columns and facts of a PROFILE table."""
    cells = np.stack([np.asarray(columns[name], np.float64) for name in ("tile_tokens", "tile_us", "kstep_us")], 1)
    keys = list(zip(columns["phase"], columns["scheme"], strict=True))
    tiles = {}
    for phase, name in sorted({(str(phase), str(name)) for phase, name in keys}):
        own = cells[[key == (phase, name) for key in keys]]
        tiles[phase, parse_scheme(name)] = own[own[:, 0].argsort()]
    architecture = for_target(str(facts["arch"])) or DEFAULT
    numbers: dict[str, Any] = {key: facts[key] for key in ("sms", *CONSTANTS, "estimate", "device")}
    return Profile(tiles, **numbers, architecture=architecture)


def read_profile(path: str | Path) -> Profile:
    """Read a PROFILE table; `UserError` unless every scheme has kernels of all phases."""
    table, facts = read_table(PROFILE, path)
    profile = profile_of({name: np.array(table.column(name).to_pylist()) for name in table.column_names}, facts)
    wrong = set(profile.tiles) ^ {(phase, scheme) for phase in PHASES for scheme in profile.schemes}
    if wrong:
        phase, scheme = min(wrong)
        raise UserError(f"{path}: {scheme} has no times in phase {phase}, or there is no such phase; run profile again")
    return profile


def timing_schemes(schemes: tuple[Scheme, ...], profile: Profile, time_as: dict[Scheme, Scheme]) -> list[Scheme]:
    """Whose kernel times each scheme: the one `time_as` names, its own, or the one that runs it.

    `UserError` names a scheme that no kernel of the profile times.
    """
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
