"""What a class of GPUs is to those who plan and launch: its names, its phases, its kernels. Stdlib only.

Every class has a room, a package beside this module with an `Architecture` and a generator; `architectures` and
`build` register them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from mxmoe_steps.kernels.codes.format import Format


class Configuration(Protocol):
    """What is asked of one kernel's configuration: a frozen dataclass of the room.

    ``formats``, ``operands``: the weight formats and the types of activations, in argument order. ``max_problems``:
    rows of its problem table. ``blocks_per_sm``: blocks that a multiprocessor runs at once, in clusters of ``cluster``.
    """

    def __hash__(self) -> int: ...

    @property
    def formats(self) -> tuple[Format, ...]: ...
    @property
    def operands(self) -> tuple[str, ...]: ...
    @property
    def max_problems(self) -> int: ...
    @property
    def blocks_per_sm(self) -> int: ...
    @property
    def cluster(self) -> int: ...
    @property
    def name(self) -> str: ...
    def spec(self) -> dict[str, Any]:
        """Plain data that identifies it."""


class Architecture(ABC):
    """``name`` and ``gpus``: as users know it. ``capability``: compute capability of its GPUs. ``target``: its name for
    compilers. ``phase_rows``: weight rows of a tile by phase, those of the fewest tokens first.

    ``configuration``: class of its configurations. ``generator``: module that generates its grouped GEMMs.
    """

    name: ClassVar[str]
    gpus: ClassVar[str]
    capability: ClassVar[tuple[int, int]]
    target: ClassVar[str]
    phase_rows: ClassVar[Mapping[str, int]]
    configuration: ClassVar[type]
    generator: ClassVar[str]

    @property
    def phases(self) -> tuple[str, ...]:
        """Kernels of a launch, for few tokens to many."""
        return tuple(self.phase_rows)

    @abstractmethod
    def config(
        self, formats: tuple[Format, ...], phase: str, max_problems: int = 128, gated: bool = False
    ) -> Configuration:
        """The kernel of ``phase`` that multiplies any mixture of ``formats``.

        ``gated``: weights are gate and up, `GATE_ROWS` rows of each in turn, and what it stores is silu(gate) * up.
        """

    @abstractmethod
    def token_tiles(self, format_: Format, phase: str) -> tuple[int, ...]:
        """Tokens of the tiles in the kernel of ``phase`` that multiplies ``format_`` alone, ascending."""

    @abstractmethod
    def phase_for(self, rows: int, experts: int, slices: int, strips: int, sms: int, by_warp: bool) -> str:
        """The phase of a launch of ``rows`` tokens routed over ``experts`` experts, on ``sms`` multiprocessors.

        ``slices``: experts more that take every token; ``strips``: of 64 weight rows, in an expert; ``by_warp``: of the
        launch's formats.
        """

    @abstractmethod
    def by_warp(self, formats: tuple[Format, ...]) -> bool:
        """Whether warps multiply the tiles of the fewest tokens, each on its own, in all ``formats``."""
