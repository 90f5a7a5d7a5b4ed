"""Print which model families are supported, what of it in which step and on which kernels, and which are refused.

``python -m mxmoe_steps.models``; the same tables stand in docs/models.md.
"""

from mxmoe_steps.models.adapters import FAMILIES, REFUSED, Family

STEPS = "trace, capture, calibrate, quantize, evaluate; loading with transformers"
FAMILY_HEAD = ("model_type", "experts are stored", "shared expert", "differs in", "Hopper kernels")
_STORED = {
    "rows": "stacked",
    "columns": "stacked, transposed",
    "either": "stacked, transposed or not",
    "alternating": "stacked, transposed, gate and up alternating",
}


def family_rows() -> list[tuple[str, ...]]:
    """A row of `FAMILY_HEAD` for every family."""
    return [
        (
            f"`{name}`",
            _stored(family),
            f"`{family.shared}`" + (", gated" if family.shared_gate else "") if family.shared else "",
            _differs(family),
            f"reference arithmetic: {family.without_kernels}" if family.without_kernels else "yes",
        )
        for name, family in sorted(FAMILIES.items())
    ]


def refused_rows() -> list[tuple[str, str]]:
    """Every family that cannot work, and why; then keys of ``config.json`` that rule out models of the others."""
    keys: dict[str, str] = {}
    for name, family in sorted(FAMILIES.items()):
        for key, (values, why) in family.only.items():
            allowed = " or ".join(f"`{value}`" for value in values) or "absent"
            keys[f"`{name}` unless `{key}` is {allowed}"] = why
    return [*((f"`{name}`", why) for name, why in sorted(REFUSED.items())), *keys.items()]


def _stored(family: Family) -> str:
    if family.orientation != "rows":
        return _STORED[family.orientation]
    if family.stacked[0].endswith(".weight"):
        return f"stacked, `{family.stacked[0].removesuffix('.weight')}`"
    return f"one by one or stacked, `{'`, `'.join(family.blocks[not family.gated :])}`" if family.moe else "stacked"


def _differs(family: Family) -> str:
    facts = {
        "vision-language, vision is copied": family.is_wrapper,
        "no gate": not family.gated,
        "biases": family.biased,
        "clamped": family.clamped,
        "router weights multiply inputs": family.scales_inputs,
        "router correction": family.router_bias is not None,
    }
    return ", ".join(fact for fact, holds in facts.items() if holds)


def main() -> None:
    """Command line."""
    rows = [FAMILY_HEAD, *family_rows()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(FAMILY_HEAD))]
    print(f"Every family runs {STEPS}.\n")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nRefused:")
    for what, why in refused_rows():
        print(f"{what}: {why}")


if __name__ == "__main__":
    main()
