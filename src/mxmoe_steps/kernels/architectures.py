"""Which classes of GPUs there are kernels for. Stdlib only."""

from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architecture import Architecture
from mxmoe_steps.kernels.mma.architecture import GPUS, ON_HOPPER
from mxmoe_steps.kernels.sm90.architecture import HOPPER

ARCHITECTURES: tuple[Architecture, ...] = (HOPPER, *GPUS)
BUILT: tuple[Architecture, ...] = (*ARCHITECTURES, ON_HOPPER)  # also what no GPU picks
DEFAULT = ARCHITECTURES[0]  # where no GPU says: what is compiled ahead of time, and what times are predicted for
PHASE_ROWS, PHASES = DEFAULT.phase_rows, DEFAULT.phases

NAMES = " or ".join((", ".join(one.name for one in ARCHITECTURES[:-1]), ARCHITECTURES[-1].name))
CAPABILITIES = ", ".join("{}.{} ({})".format(*one.capability, one.gpus) for one in ARCHITECTURES)


def for_capability(capability: tuple[int, int]) -> Architecture | None:
    """The one of GPUs of a compute capability, if there are kernels for them."""
    return next((one for one in ARCHITECTURES if one.capability == capability), None)


def require(capability: tuple[int, int], device: str) -> Architecture:
    """That of ``device``, a GPU of a compute capability; `UserError` if there are no kernels for it."""
    architecture = for_capability(capability)
    if architecture is None:
        major, minor = capability
        raise UserError(f"{device} has compute capability {major}.{minor}; the kernels are for {CAPABILITIES}")
    return architecture


def for_target(target: str) -> Architecture | None:
    """The one that compilers call ``target``, if there are kernels for it."""
    return next((one for one in ARCHITECTURES if one.target == target), None)
