"""Whether what a configuration names exists: texts, kernels on the chosen hardware, blocks of the model. No PyTorch."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mxmoe_steps.allocation.constraints import parse_constraints, select
from mxmoe_steps.allocation.domains import parse_weights
from mxmoe_steps.data.parsing import parse_source
from mxmoe_steps.data.sources import SOURCES, MixText
from mxmoe_steps.errors import UserError
from mxmoe_steps.kernels.architectures import for_target
from mxmoe_steps.kernels.formats import kernel_format
from mxmoe_steps.models.families import ModelFolder
from mxmoe_steps.quantizers.names import is_rotated
from mxmoe_steps.schemes import ORIGINAL, SHARED, parse_scheme
from mxmoe_steps.timing.blocks import blocks_of
from mxmoe_steps.timing.estimate import measured_file, read_hardware
from mxmoe_steps.timing.shapes import shape_like

if TYPE_CHECKING:
    from mxmoe_steps.config.sections import Config, Solve


def check_texts(config: "Config") -> None:
    """`ValueError` for a text source that cannot be read or is not there."""
    sources = {}
    for name, value in config.texts.items():
        try:
            sources[name] = parse_source(name, value)
        except UserError as error:
            raise ValueError(str(error)) from None
    used = {
        "trace.texts": config.trace.texts,
        "calibrate.text": [config.calibrate.text],
        "evaluate.texts": config.evaluate.texts,
    }
    for name, source in sources.items():
        if isinstance(source, MixText):
            used[f"texts.{name}.mix"] = list(source.mix)
        missing = [file for file in source.local_files() if not Path(file).is_file()]
        if missing:
            (key,) = SOURCES.keys() & config.texts[name].keys()
            raise ValueError(f"texts.{name}.{key}: no such file {missing[0]}")
    for key, names in used.items():
        known(key, names, list(sources), "a text source")


def check_budgets(config: "Config") -> None:
    """`ValueError` where no candidate can go as low as a budget; `frontier` knows the exact figure."""
    wide = 1 << 20  # input features: per-channel overhead vanishes, so this is a lower bound
    least = min(config.calibrate.schemes, key=lambda name: parse_scheme(name).bits(wide))
    bits = parse_scheme(least).bits(wide)
    budgets = [("sweep", grid.budget_bits) for grid in config.sweep]
    budgets += [("extrapolate", config.extrapolate.budget_bits)] if config.extrapolate else []
    for section, found in budgets:
        if min(found) < bits:
            raise ValueError(
                f"{section}: budget_bits {min(found):g} is below {bits:g}, what the smallest candidate"
                f" {least} takes; raise the budget or add a smaller scheme to calibrate.schemes"
            )


def known(key: str, names: Sequence[str], among: Sequence[str], what: str) -> None:
    """`ValueError` with a likely correction for a name that is not ``among`` those that there are."""
    for name in names:
        if name not in among:
            close = difflib.get_close_matches(name, among, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(among)}"
            raise ValueError(f"{key}: {name!r} is not {what}; {hint}")


def timed_as(config: "Config") -> dict[str, str]:
    """Scheme -> the scheme whose kernel counts for it, by canonical names."""
    pairs = (text.split("=", 1) for text in config.solve.time_as)
    return {parse_scheme(scheme).name: parse_scheme(kernel).name for scheme, kernel in pairs}


def check_kernels(config: "Config") -> None:
    """`UserError` for a candidate without a kernel on the chosen hardware, its own or one that counts for it."""
    hardware = config.profile.hardware
    measured = hardware == "local" or measured_file(hardware) is not None
    types = [] if measured else list(read_hardware(hardware)["peak_tflops"])
    architecture = None if hardware == "local" else for_target(read_hardware(hardware)["arch"])
    for scheme in config.calibrate.schemes:
        kernel = parse_scheme(timed_as(config).get(scheme, scheme))
        try:
            if measured:
                format_ = kernel_format(kernel)
                if architecture is not None:  # of a local GPU, compile asks
                    architecture.check([format_])
            elif kernel.compute_type not in types:
                raise UserError(f"scheme {kernel}: {hardware} has no {kernel.compute_type} tensor cores")
        except UserError as error:
            raise UserError(
                f"calibrate.schemes: {error}; take it out, or count another one's kernel, e.g."
                f" solve.time_as: [{scheme}=w4a16]"
            ) from None


def check_rotation(config: "Config") -> None:
    """`ValueError` for published codes and a quantizer that would rotate them."""
    published = [name for name in config.calibrate.schemes if parse_scheme(name).published]
    rotating = [name for name in config.calibrate.quantizers if is_rotated(name)]
    if published and rotating:
        raise ValueError(
            f"calibrate.schemes: {published[0]}: published codes are not rotated; take it out, or {rotating[0]} out of"
            " calibrate.quantizers"
        )


def check_constraints(config: "Config") -> None:
    """`UserError` for a setting of ``solve`` that `frontier` could not read, or that no candidate meets."""
    solve, nothing = config.solve, {key: list[str]() for key in ("fix", "min_bits", "time_as")}
    for key in nothing:
        try:
            parse_constraints(**(nothing | {key: getattr(solve, key)}), max_schemes=None, tie_gate_up=False)
        except UserError as error:
            raise UserError(f"solve.{key}: {error}") from None
    try:
        weighted = parse_weights(solve.domain_weights)
    except UserError as error:
        raise UserError(f"solve.domain_weights: {error}") from None
    known("solve.domain_weights", list(weighted), config.domains, "a calibrated domain")
    constraints = parse_constraints(solve.fix, solve.min_bits, [], None, False)
    candidates = [*map(parse_scheme, config.calibrate.schemes), *([ORIGINAL] if solve.keep_original else [])]
    for selector, scheme in constraints.fixed:
        if scheme not in {*candidates, ORIGINAL}:
            raise UserError(f"solve.fix: {selector}={scheme}: {scheme} is not in calibrate.schemes; add it there")
    for selector, floor in constraints.min_bits:
        if max(scheme.bits(1) for scheme in candidates) < floor:  # more than in any real block
            raise UserError(f"solve.min_bits: {selector}={floor:g}: no scheme of calibrate.schemes has as many bits")


def check_selectors(solve: "Solve", folder: ModelFolder) -> None:
    """`UserError` for a selector that names no block of the model."""
    blocks = blocks_of(folder)
    constraints = parse_constraints(solve.fix, solve.min_bits, [], None, False)
    for key, settings in (("fix", constraints.fixed), ("min_bits", constraints.min_bits)):
        for selector, _ in settings:
            try:
                select(selector, blocks)
            except UserError as error:
                raise UserError(f"solve.{key}: {error}") from None


def check_shape(config: "Config", folder: ModelFolder) -> None:
    """`UserError` for layers to extrapolate to that cannot take the model's losses, and for layers to time that have no
    experts."""
    unknown = sorted(set(config.time.layers) - set(folder.moe_layers))
    if unknown:
        raise UserError(f"time.layers: layer {unknown[0]} has no experts; those of the model are {folder.moe_layers}")
    if config.extrapolate is not None:
        try:
            shape_like(config.extrapolate.shape, shared=SHARED in folder.expert_ids())
        except UserError as error:
            raise UserError(f"extrapolate.shape: {error}") from None
