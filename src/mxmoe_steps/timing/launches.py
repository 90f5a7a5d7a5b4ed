"""Which launches `measure` times: single tiles at full occupancy, and random whole problems.

A launch is one grouped GEMM, gate+up or down of a layer. Everything here follows from the schemes and a seed, so
`compile` knows the kernels that `measure` will load. No torch.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architecture import Architecture, Configuration
from mxmoe_steps.kernels.codes.format import Format
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.kernels.shared import interleave
from mxmoe_steps.schemes import Scheme, parse_scheme
from mxmoe_steps.timing.shapes import MODELS, LayerShape
from mxmoe_steps.timing.traffic import routed_rows

MAX_PROBLEMS = 256  # of every measured kernel: two blocks of 128 experts
TILE_PROBLEMS = 128  # of a tile launch, at most
TILE_SHAPES = ((2048, 768), (1408, 2048), (2048, 4096))  # (N, K) of tile launches
SHORT_SHAPE = (2048, 1408)  # once more with few tiles, to tell a launch's fixed time from a tile's
SHORT_PROBLEMS = 33
MIXTURE_SIZES = (2, 2, 2, 3, 3, 4, 4, 6)
MOST_TOKENS = 8192


@dataclass(frozen=True)
class Launch:
    """One grouped GEMM over P problems, each an expert's rows times [N, K] weights of its own scheme.

    ``kind``: ``problem``, or ``tile``: all problems are the same one, rows, weights and outputs, so that
    everything stays in the L2 cache. ``carried``: formats of the kernel's mixture, present or not.
    """

    kind: str
    model: str  # whose shapes, or the tile's shape
    block: str
    tokens: int
    n: int
    k: int
    rows: tuple[int, ...]  # [P]
    schemes: tuple[str, ...]  # [P]
    carried: tuple[Format, ...]
    slices: int = 0  # of a shared expert, the last of the experts

    @cached_property
    def blocks(self) -> int:
        """Problems of one expert."""
        return 2 if self.block == "gate_up" else 1

    @cached_property
    def expert_rows(self) -> tuple[int, ...]:
        """Rows of every expert."""
        return self.rows[:1] if self.kind == "tile" else self.rows[:: self.blocks]

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The problems as `kernels.plan` orders them."""
        routed = len(self.expert_rows) - self.slices
        return tuple(interleave([(p // self.blocks >= routed, name) for p, name in enumerate(self.schemes)]))

    @property
    def mixed(self) -> bool:
        """Whether more than one format takes part."""
        return len({kernel_format(parse_scheme(name)) for name in self.schemes}) > 1

    def config(self, architecture: Architecture, phase: str) -> Configuration:
        """The kernel that runs it in one launch."""
        return architecture.config(self.carried, phase, MAX_PROBLEMS)

    def configs_apart(self, architecture: Architecture, phase: str) -> list[Configuration]:
        """The kernels that run it in one launch per format."""
        return [architecture.config((format_,), phase, MAX_PROBLEMS) for format_ in self.carried]


def formats_of(schemes: list[Scheme], architecture: Architecture) -> tuple[Format, ...]:
    """The formats of ``schemes``, in a kernel's order; `UserError` for one without a kernel of ``architecture``."""
    formats = tuple(sorted({kernel_format(scheme) for scheme in schemes}))
    try:
        architecture.check(formats)
    except UserError as error:
        raise UserError(
            f"{error}; take it out of the schemes (calibrate.schemes), or count another one's kernel with solve.time_as"
        ) from None
    return formats


def mixtures(formats: tuple[Format, ...], seed: int = 0) -> list[tuple[Format, ...]]:
    """Random subsets of the formats, without repeats."""
    generator = np.random.default_rng(seed)
    subsets: dict[tuple[Format, ...], None] = {}
    for size in MIXTURE_SIZES:
        if size <= len(formats):
            picked = generator.choice(len(formats), size, replace=False)
            subsets[tuple(sorted(formats[i] for i in picked))] = None
    return list(subsets)


def tile_launches(architecture: Architecture, formats: tuple[Format, ...], sms: int) -> list[tuple[Launch, str]]:
    """A launch for every tile of the formats' own kernels and (N, K), with its phase; whole waves over ``sms``."""
    launches = []
    for format_ in formats:
        for phase in architecture.phases:
            for tokens in architecture.token_tiles(format_, phase):
                for n, k in (*TILE_SHAPES, SHORT_SHAPE):
                    step = 2 * sms // math.gcd(2 * sms, -(-n // 128))
                    most = SHORT_PROBLEMS if (n, k) == SHORT_SHAPE else TILE_PROBLEMS
                    problems = max(1, most // step) * step if step <= most else most
                    launch = Launch(
                        "tile", f"{n}x{k}", "down", tokens, n, k,
                        (tokens,) * problems, (format_.name,) * problems, (format_,),
                    )  # fmt: skip
                    launches.append((launch, phase))
    return launches


def skewed_rows(shape: LayerShape, tokens: int, skew: float, generator: np.random.Generator) -> np.ndarray:
    """Rows of each expert and slice, int64: top-k of Gumbel noise over popularities 1 / rank^skew; slices take all."""
    logits = -skew * np.log(generator.permutation(shape.experts) + 1.0)
    return np.append(routed_rows(logits, tokens, shape.top_k, generator), np.full(shape.slices, tokens))


def problem_launches(formats: tuple[Format, ...], count: int, seed: int = 0) -> list[Launch]:
    """``count`` random launches of one format and ``count`` of random mixtures.

    Models, gate+up and down, formats and mixtures take turns; tokens are log-uniform in 1 .. 8192; popularity skew is
    uniform in 0 .. 1; inside a mixture every block draws its scheme with random odds.
    """
    generator = np.random.default_rng([seed, 1])
    mixed = mixtures(formats, seed)
    launches = []
    for number in range(count * (2 if mixed else 1)):
        carried = (formats[number % len(formats)],) if number < count else mixed[number % len(mixed)]
        shape = MODELS[generator.integers(len(MODELS))]
        block = ("gate_up", "down")[generator.integers(2)]
        n, k = shape.size(block)
        tokens = round(2 ** generator.uniform(0, math.log2(MOST_TOKENS)))
        rows = skewed_rows(shape, tokens, generator.uniform(), generator).repeat(2 if block == "gate_up" else 1)
        odds = generator.dirichlet(np.ones(len(carried)))
        drawn = generator.choice(len(carried), len(rows), p=odds)
        names = tuple(carried[i].name for i in drawn)
        launch = Launch(
            "problem", shape.model, block, tokens, n, k, tuple(rows.tolist()), names, carried, shape.slices
        )  # fmt: skip
        launches.append(launch)
    return launches


def kernel_configs(architecture: Architecture, formats: tuple[Format, ...], seed: int = 0) -> list[Configuration]:
    """Every kernel that the launches need: each format's own and the mixtures', of every phase."""
    carried = [*((format_,) for format_ in formats), *mixtures(formats, seed)]
    return [architecture.config(each, phase, MAX_PROBLEMS) for each in carried for phase in architecture.phases]
