"""profile: what launches of the grouped GEMM kernels cost on a GPU, for the time model of `frontier`.

Fits the model to measurements: those that `measure` took on this machine's GPU, or those that come with the package.
The error on held-out problems goes into the table and to stderr. For a GPU that nothing was measured on the times are
a roofline estimate from its data sheet, and every result that uses them says so.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from mxmoe_steps.errors import UserError, run_cli
from mxmoe_steps.made_from import recorded
from mxmoe_steps.options.base import Flag, InFile, OutFile, Schemes, StepOptions
from mxmoe_steps.options.command_line import parse
from mxmoe_steps.schemes import Scheme, parse_scheme
from mxmoe_steps.timing.estimate import HARDWARE, data_sheets, estimate_profile, measured_file, read_hardware


class ProfileOptions(StepOptions):
    """Options of the step."""

    hardware: Annotated[str | None, Flag("GPU")] = Field(None, description="a GPU that the package knows, e.g. h100")
    measurements: InFile | None = Field(None, description="instead: table that measure wrote")
    schemes: Schemes = Field(description="schemes to know the times of")
    out: OutFile = Field(description="parquet file to write")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.hardware is None) == (self.measurements is None):
            raise ValueError("give one of --hardware and --measurements")
        return self

    @property
    def measured(self) -> Path | None:
        """The measurements to fit: those of this machine, or of a named GPU if there are any."""
        return self.measurements if self.hardware is None else measured_file(self.hardware)


def fit_profile(path: Path, schemes: list[Scheme]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Columns and facts of a PROFILE table from a table of measurements."""
    from mxmoe_steps.kernels.architectures import for_capability
    from mxmoe_steps.timing.fit import fit
    from mxmoe_steps.timing.measurements import read_measurements

    rows, measured = read_measurements(path)
    if not rows:  # a GPU that the kernels do not run on
        known = data_sheets()
        names = [name for name, sheet in known.items() if sheet["device"] == measured["device"]]
        if not names:
            raise UserError(
                f"no kernels for {measured['device']} and no data sheet of it: add it to {HARDWARE}, or set"
                f" profile.hardware to one of {', '.join(sorted(known))}"
            )
        print(f"profile: no kernels for {measured['device']}; its data sheet is used", file=sys.stderr)
        return estimate_profile(schemes, known[names[0]])
    architecture = for_capability(tuple(measured["capability"]))
    assert architecture is not None  # the table has rows
    try:
        columns, fitted = fit(rows, measured["sms"], architecture)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for scheme in schemes:
        if not {one.name for one in scheme.runs_as} & set(columns["scheme"]):
            raise UserError(
                f"{path}: no times of a kernel that runs {scheme}: measure with it, or count another one's, e.g."
                f" solve.time_as: [{scheme}={columns['scheme'][0]}]"
            )
    source = f"measured on {measured['date']}, {measured['rounds']} rounds"
    facts = {"arch": architecture.target, "estimate": False, "source": source}
    return columns, measured | fitted | facts


def summary(facts: dict[str, Any]) -> str:
    """The fit in a few lines."""
    lines = [f"{facts['device']}, {facts['source']}"]
    for kind, error in facts["errors"].items():
        lines.append(
            f"held-out error, {error['problems']} {kind} problems: median {error['median']:.1%},"
            f" 95th percentile {error['p95']:.1%}"
        )
    repeat, loss = facts["repeat_spread"], facts["phase_loss"]
    lines.append(f"repeat-to-repeat spread: median {repeat['median']:.1%}, 95th percentile {repeat['p95']:.1%}")
    lines.append(
        f"time lost by the rule that picks the kernel of a phase: median {loss['median']:.1%}, 95 % {loss['p95']:.1%}"
    )
    for one in facts["fused_over_apart"]:
        lines.append(
            f"fused / one launch per scheme, from {one['tokens_from']} tokens: median {one['median']:.2f}"
            f" ({one['least']:.2f} to {one['most']:.2f}, {one['launches']} problems)"
        )
    return "\n".join(lines)


def profile(options: ProfileOptions) -> None:
    """Write the profile."""
    from mxmoe_steps.tables import PROFILE, write_table

    schemes = [parse_scheme(text) for text in options.schemes]
    if (path := options.measured) is not None:
        columns, facts = fit_profile(path, schemes)
    else:
        assert options.hardware is not None
        columns, facts = estimate_profile(schemes, read_hardware(options.hardware))
    if not facts["estimate"]:
        print(summary(facts), file=sys.stderr)
    write_table(PROFILE, options.out, columns, facts)


def main() -> None:
    """Command line."""
    options = parse(ProfileOptions, __doc__)
    with recorded(options.made_from, [options.out]):
        profile(options)


if __name__ == "__main__":
    run_cli(main)
