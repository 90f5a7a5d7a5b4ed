"""What a layer's two grouped GEMMs are made of: stacks of blocks, problems, kernels. Stdlib only.

A shared expert whose width is s times the routed one runs as s more experts that take every token: rows
of its gate and up blocks, columns of its down block. Its problems and those of every format are spread over the launch,
so that tiles which wait for memory run beside tiles which compute.

Experts whose width is no multiple of 64 are filled up with features of zeros.

Where inputs are rotated, packed blocks read rotated rows and blocks kept in 16 bits plain ones. But gate and up of an
expert have the same bfloat16 rows: beside a packed block that reads bfloat16, weights kept in 16 bits are rotated, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mxmoe_steps.errors import UserError
from mxmoe_steps.gating import SWIGLU, Gating
from mxmoe_steps.kernels.architecture import ROTATED_KERNELS, Architecture, Configuration
from mxmoe_steps.kernels.codes.format import EDGE, Format
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.kernels.limits import MAX_EXPERTS, OPERAND_MASKS
from mxmoe_steps.kernels.rotation import CHUNK, LEAST, ROTATED_BF16, SPAN, span
from mxmoe_steps.kernels.shared import interleave, shared_slices, strips
from mxmoe_steps.schemes import SHARED, Scheme

Schemes = tuple[Scheme, Scheme, Scheme]  # of gate, up and down


@dataclass(frozen=True)
class Source:
    """A block of the model, or ``gate_up`` for two in one, its scheme, the number of entries that it is cut into, and
    the features of zeros that are added to the inner width of each.

    ``rotate``: it is kept in 16 bits and yet reads rotated rows: its weights have to be rotated, too.
    """

    expert: int
    block: str
    scheme: Scheme
    entries: int
    padding: int = 0
    rotate: bool = False


@dataclass(frozen=True)
class LaunchPlan:
    """One grouped GEMM.

    ``formats``: in the kernel's order; ``stacks[i]``: the blocks of ``formats[i]``, in the order of their entries.
    ``problems``: (expert, stack, entry, output column). ``needs``: per expert, sum of `OPERAND_MASKS` it reads; where
    rows are rotated, see `rotation`. ``strips``: of 64 weight rows in an expert. ``gated``: it multiplies silu(gate)
    and up, see `Architecture.config`. ``rotated``: some blocks read rotated rows.
    """

    formats: tuple[Format, ...]
    stacks: tuple[tuple[Source, ...], ...]
    problems: tuple[tuple[int, int, int, int], ...]
    needs: tuple[int, ...]
    strips: int
    gated: bool
    rotated: bool = False

    @property
    def operands(self) -> tuple[str, ...]:
        """Activation types the launch reads."""
        return tuple(sorted({format_.operand for format_ in self.formats}))

    @property
    def max_problems(self) -> int:
        """Rows of the problem table that its kernels have."""
        return max(128, -(-len(self.problems) // 32) * 32)

    def kernels(self, architecture: Architecture) -> dict[str, Configuration]:
        """Those that run it, by phase."""
        return {
            phase: architecture.config(self.formats, phase, self.max_problems, self.gated)
            for phase in architecture.phases
        }


@dataclass(frozen=True)
class LayerPlan:
    """A layer of ``experts`` routed experts and ``slices`` of a shared one, [hidden] to [hidden] features.

    ``intermediate``: width of an expert, of which the last ``padding`` features are zero. ``elsewhere``: the last of
    ``experts`` stands for all that are on other GPUs. It has no blocks and adds nothing.
    """

    experts: int
    slices: int
    hidden: int
    intermediate: int
    gate_up: LaunchPlan
    down: LaunchPlan
    elsewhere: bool = False
    gating: Gating = SWIGLU
    padding: int = 0

    @property
    def rotated(self) -> bool:
        """Whether some block reads rotated rows."""
        return self.gate_up.rotated or self.down.rotated

    @property
    def token_kernels(self) -> tuple[str, ...]:
        """Kernels around the grouped GEMMs beyond those that all layers load."""
        own = self.gating.token_kernels
        if not self.rotated:
            return own
        return (*own, *ROTATED_KERNELS, *(f"{name}_rotated" for name in own if name.startswith("activate")))

    def check(self, architecture: Architecture) -> None:
        """`UserError` unless kernels of ``architecture`` multiply all formats."""
        architecture.check((*self.gate_up.formats, *self.down.formats))


def plan_layer(
    schemes: Mapping[int, Schemes],
    hidden: int,
    intermediate: int,
    shared: int = 0,
    elsewhere: bool = False,
    gating: Gating = SWIGLU,
    rotated: bool = False,
) -> LayerPlan:
    """Plan a layer from the schemes of its experts, numbered from 0, and of `SHARED` if it has that.

    ``intermediate``, ``shared``: widths of a routed and of the shared expert. Gate and up are multiplied in their own
    launch if they have the same scheme in every expert and ``gating`` is SwiGLU; the first scheme of an expert without
    gate is not looked at. ``elsewhere``: other GPUs have more experts, see `LayerPlan`. ``rotated``: the inputs of
    packed blocks are. `UserError` says why there is no kernel for it.
    """
    if hidden % EDGE:
        raise UserError(f"hidden states of {hidden} features: kernels need a multiple of {EDGE}")
    here = len(schemes) - (SHARED in schemes)
    experts = here + elsewhere
    slices = 0
    if SHARED in schemes:
        slices = shared_slices(shared, intermediate)
        if not slices:
            raise UserError(f"shared expert of width {shared}: no multiple of the routed experts' {intermediate}")
        if gating.biased:
            raise UserError("the kernels add no biases of a shared expert")
    if experts + slices > MAX_EXPERTS:
        raise UserError(f"{experts} experts and {slices} shared; the sort kernel takes {MAX_EXPERTS} together")
    if rotated:
        _check_rotation(hidden, intermediate, *([shared] if slices else []))
    order = [*([SHARED] if slices else []), *range(here)]
    padding = -intermediate % EDGE
    width = intermediate + padding
    first = {"gate": 0, "up": width} if gating.gated else {"up": 0}
    if gating.plain and _gated(schemes):
        first = {"gate_up": 0}
    gate_up, down = (
        _plan_launch([(e, schemes[e]) for e in order], blocks, experts, slices, n, k, padding, rotated)
        for blocks, n, k in ((first, width, hidden), ({"down": 0}, hidden, intermediate))
    )
    if slices > 1:
        _check_slices(down, intermediate)
    return LayerPlan(experts, slices, hidden, width, gate_up, down, elsewhere, gating, padding)


def _check_slices(down: LaunchPlan, width: int) -> None:
    """`UserError` where a group of the shared expert's down block could belong to two slices, or zeros lie between
    slices of a row that is rotated as one."""
    if down.rotated and width % EDGE:
        raise UserError(
            f"rotated inputs of a shared expert in slices of the routed experts' width, {width}: kernels need a"
            f" multiple of {EDGE}"
        )
    for format_ in down.formats:
        if width % format_.feature_multiple:
            raise UserError(
                f"down blocks under {format_.name}: kernels cut a shared expert into slices of the routed experts'"
                f" width, {width}, and need a multiple of {format_.feature_multiple}"
            )


def _gated(schemes: Mapping[int, Schemes]) -> bool:
    """Whether gate and up of every expert have one scheme, and so can be rows of one block."""
    return all(gate == up for gate, up, _ in schemes.values())


def _check_rotation(*widths: int) -> None:
    for features in widths:
        together = span(features)
        if not LEAST <= together <= CHUNK:
            raise UserError(
                f"rotated inputs of {features} features: the kernels rotate {LEAST} to {CHUNK} together, not {together}"
            )


def _plan_launch(
    schemes: Sequence[tuple[int, Schemes]],
    columns: Mapping[str, int],
    experts: int,
    slices: int,
    n: int,
    k: int,
    padding: int,
    rotated: bool,
) -> LaunchPlan:
    """``columns``: output column of each block kind; ``n``, ``k``: output and input features of a block of a routed
    expert; ``padding``: see `Source`."""
    numbered = {"gate": 0, "up": 1, "down": 2, "gate_up": 0}
    own = [(expert, block, three[numbered[block]]) for expert, three in schemes for block in columns]
    blocks = [(expert, block, scheme, kernel_format(scheme)) for expert, block, scheme in own]
    formats = tuple(sorted({format_ for *_, format_ in blocks}))
    packed = {(expert, format_.operand) for expert, *_, format_ in blocks if rotated and not format_.original}
    stacks: list[list[Source]] = [[] for _ in formats]
    counts = [0] * len(formats)
    needs = [0] * (experts + slices)
    problems = []
    for expert, block, scheme, format_ in blocks:
        number = formats.index(format_)
        numbers = range(experts, experts + slices) if expert == SHARED else [expert]
        turned = (expert, format_.operand) in packed
        stacks[number].append(Source(expert, block, scheme, len(numbers), padding, turned and format_.original))
        for place in numbers:
            problems.append((place, number, counts[number], columns[block]))
            needs[place] |= ROTATED_BF16 if turned and format_.operand == "bf16" else OPERAND_MASKS[format_.operand]
            if turned:
                needs[place] |= SPAN * span(k * len(numbers) if block == "down" else k)
            counts[number] += 1
    order = interleave([(problem[0] >= experts, problem[1]) for problem in problems])
    gated = "gate_up" in columns
    in_order = tuple(problems[i] for i in order)
    in_strips = strips([n] * len(columns) * (1 + gated))
    return LaunchPlan(formats, tuple(map(tuple, stacks)), in_order, tuple(needs), in_strips, gated, bool(packed))
