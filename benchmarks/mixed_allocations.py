"""Layers with mixed allocations, for mixed_launch.py: made by the solver, kept in mixed_allocations.json.

Allocations minimise L^r T^(1-r) for one layer, r = 0.75, under a budget of bits, every block on its own, with three
candidate schemes. Shapes, routing and the time model (the measured H100 profile) are real; the *losses are made up*
(instances.py): an allocation says what mixtures look like, not what a model loses. ``hot``: the shared expert and the
busiest quarter of the others at w8a8_fp8, the rest at w4a16. Uniform precisions are allocations too.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from group_gemm import WORKLOADS, Workload
from moe_layer import SLICES, schemes_of

from mxmoe_steps.allocation.files import DIGITS
from mxmoe_steps.kernels.plan import LayerPlan, plan_layer
from mxmoe_steps.schemes import BLOCKS, ORIGINAL, SHARED, Scheme, parse_scheme

FILE = Path(__file__).with_name("mixed_allocations.json")
TOKENS = (16, 64, 256, 512, 1024, 4096, 8192)
BUDGETS = ("4.25", "5")
R = 0.75
CANDIDATES = ("w3a16", "w4a8_fp8", "w8a8_fp8")  # few: every main loop that a kernel carries costs each tile
UNIFORM = ("w4a8_fp8", "w4a16", "w8a8_fp8", "w8a16", "w16a16")


@dataclass(frozen=True)
class Case:
    """A workload whose shared expert, if any, runs as ``slices`` experts more."""

    workload: Workload
    slices: int

    @property
    def name(self) -> str:
        return self.workload.name + ("+shared" if self.slices else "")

    @property
    def experts(self) -> int:
        return self.workload.experts + self.slices

    def rows(self, tokens: int) -> list[int]:
        """Rows of each expert and slice."""
        return [*self.workload.routing(tokens), *[tokens] * self.slices]


CASES = (
    Case(WORKLOADS[0], SLICES[WORKLOADS[0].name]),
    *(Case(workload, 0) for workload in WORKLOADS),
)


@dataclass(frozen=True)
class Allocation:
    """Schemes of one layer: ``schemes`` has a digit per block, shared expert first, then gate, up and down.

    ``tiles``: of every format, rows (tokens, tile_us, kstep_us), in the profile's kernel for this many tokens.
    """

    name: str
    case: Case
    tokens: int
    schemes: tuple[Scheme, ...]
    bits: float
    loss: float
    predicted_us: float
    tiles: dict[str, np.ndarray]

    @cached_property
    def plan(self) -> LayerPlan:
        members = [*([SHARED] if self.case.slices else []), *range(self.case.workload.experts)]
        of = {expert: self.schemes[3 * i : 3 * i + 3] for i, expert in enumerate(members)}
        inner = self.case.workload.intermediate
        return plan_layer(of, self.case.workload.hidden, inner, inner * self.case.slices)

    def in_int8(self) -> "Allocation":
        """The same with int8 activations, which have instructions on every GPU, wherever there are fp8 ones."""
        integers = {scheme: parse_scheme(f"w{scheme.weight_bits}a8") for scheme in self.schemes if scheme.fp8}
        schemes = tuple(integers.get(scheme, scheme) for scheme in self.schemes)
        tiles = self.tiles | {new.name: self.tiles[old.name] for old, new in integers.items()}
        return replace(self, name=self.name.removesuffix("_fp8"), schemes=schemes, tiles=tiles)

    @property
    def shares(self) -> str:
        """Share of the weights under each scheme."""
        weight = Counter[Scheme]()
        for index, scheme in enumerate(self.schemes):
            weight[scheme] += self.case.slices if self.case.slices and index < len(BLOCKS) else 1
        return ", ".join(f"{s.name.split('_')[0]} {count / weight.total():.0%}" for s, count in sorted(weight.items()))


def solve(path: Path) -> None:
    """Write the allocations, and uniform ones, of every case and number of tokens."""
    from instances import SCHEMES, make_losses

    from mxmoe_steps.allocation.constraints import Constraints
    from mxmoe_steps.allocation.domains import Domains
    from mxmoe_steps.allocation.enlarged import layer_blocks
    from mxmoe_steps.allocation.parts import part_frontier
    from mxmoe_steps.allocation.pick import pick_by_r
    from mxmoe_steps.profile import fit_profile
    from mxmoe_steps.timing.estimate import measured_file
    from mxmoe_steps.timing.layer import step_phases
    from mxmoe_steps.timing.predict import block_times, mean_layer_us
    from mxmoe_steps.timing.profile import profile_of, timing_schemes
    from mxmoe_steps.timing.traffic import Traffic

    lines: list[str] = []
    schemes = (*sorted(map(parse_scheme, SCHEMES)), ORIGINAL)
    names = [scheme.name for scheme in schemes]
    carried = sorted(map(parse_scheme, CANDIDATES))
    columns, facts = fit_profile(measured_file("h100"), list(schemes))
    plain = Domains(np.ones(1), np.full(1, np.inf), worst=False)
    profile = profile_of({name: np.array(values) for name, values in columns.items()}, facts)
    kernels = timing_schemes(schemes, profile, {})
    for case in CASES:
        inner = case.workload.intermediate
        blocks = layer_blocks([0], case.workload.experts, case.workload.hidden, inner, inner * case.slices)
        made = make_losses(blocks)
        losses = replace(
            made,
            schemes=schemes,
            loss=(loss := np.c_[made.loss, np.zeros(len(blocks))]),
            by_domain=loss[None],
            bits=np.c_[made.bits, ORIGINAL.weight_bits * blocks.params],
        )
        for tokens in TOKENS:
            rows = np.array(case.workload.routing(tokens))[None, None]
            traffic = Traffic((0,), tokens, rows, np.ones(rows.shape))
            times = block_times(blocks, kernels, traffic, profile)
            everything = np.ones(len(blocks), bool)
            found = {name: DIGITS[names.index(parse_scheme(name).name)] * len(blocks) for name in UNIFORM}
            for budget in BUDGETS:
                part = part_frontier(
                    losses, plain, carried, {None: times}, "block", budget, Constraints(), everything, 0, 1, False
                )
                found[budget] = pick_by_r(part, R, 0.5)[0].schemes
            if case.slices:
                hot = schemes_of("hot", case.workload)
                experts = blocks.expert[blocks.kind == 0].tolist()
                found["hot"] = "".join(DIGITS[names.index(scheme.name)] for e in experts for scheme in hot[e])
            for name, digits in found.items():
                chosen = np.array([DIGITS.index(digit) for digit in digits])
                index = np.arange(len(blocks))
                per_expert = zip(blocks.expert[::3].tolist(), chosen.reshape(-1, 3), strict=True)
                assignment = [[0, expert, *(names[i] for i in three)] for expert, three in per_expert]
                us = mean_layer_us({"assignment": assignment, "timed_as": {}}, blocks, traffic, profile)
                entry = {
                    "case": case.name, "tokens": tokens, "name": name, "schemes": digits,
                    "bits": round(int(losses.bits[index, chosen].sum()) / int(blocks.params.sum()), 5),
                    "loss": round(float(losses.loss[index, chosen].sum()) ** 0.5, 5),
                    "predicted_us": round(us, 2),
                    "phase": step_phases(blocks, traffic, carried, profile.sms, profile.architecture)[0],
                }  # fmt: skip
                lines.append(json.dumps(entry))
            print(case.name, tokens, flush=True)
    tiles = {
        phase: {s.name: profile.tiles[phase, s].round(4).tolist() for s in kernels}
        for phase in sorted({phase for phase, _ in profile.tiles})
    }
    head = json.dumps({"losses": "made up", "device": profile.device, "schemes": names, "tiles": tiles})
    path.write_text(head[:-1] + ',\n"allocations": [\n' + ",\n".join(lines) + "\n]}\n")


def read_allocations(path: Path, budgets: Sequence[str]) -> list[Allocation]:
    """The uniform allocations and those named in ``budgets``."""
    content = json.loads(path.read_text())
    schemes = [parse_scheme(name) for name in content["schemes"]]
    cases = {case.name: case for case in CASES}
    return [
        Allocation(
            entry["name"],
            cases[entry["case"]],
            entry["tokens"],
            tuple(schemes[DIGITS.index(digit)] for digit in entry["schemes"]),
            entry["bits"],
            entry["loss"],
            entry["predicted_us"],
            {name: np.array(rows) for name, rows in content["tiles"][entry["phase"]].items()},
        )
        for entry in content["allocations"]
        if entry["name"] in (*UNIFORM, *budgets)
    ]
