"""check: whether model and texts are what the steps need, before the first of them runs.

Compares the checkpoint with its model class by the headers of its files, and reads every text as the steps will:
their tokenizer, their sequences. Text to evaluate on must not be text to calibrate on, and every budget must be one
that some allocation meets. Writes nothing; exit status 2 and one line say what is wrong and what to do about it. A
model of the hub is downloaded.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from mxmoe_steps.arguments import add_model, natural, parser_for, positive
from mxmoe_steps.errors import UserError, run_cli

if TYPE_CHECKING:
    from mxmoe_steps.data.sources import Source
    from mxmoe_steps.models.families import ModelFolder

_MOST_SHARED = 0.1  # of the characters of a text; short documents, such as headings, may well come twice


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for the first thing that is wrong."""
    from mxmoe_steps.data.reading import TextReader
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.loading import resolve_device
    from mxmoe_steps.models.streaming import StreamedModel

    resolve_device(args.device)
    path = resolve_model(args.model, code=args.trust_remote_code)
    model = StreamedModel(path, args.dtype, "cpu", args.trust_remote_code)
    reader = TextReader(path, args.sources, args.seed, args.trust_remote_code)
    for option, split in (("trace", "calibration"), ("calibrate", "calibration"), ("evaluate", "test")):
        sequences, length, *texts = getattr(args, option)
        if int(length) > (longest := getattr(model.model.config, "max_position_embeddings", None) or int(length)):
            raise UserError(f"{option}.length: {length}, but {path} knows positions of {longest} tokens; lower it")
        for text in texts:
            reader.read(text, split, int(sequences), int(length))
    check_apart(reader.sources, args.calibrate[2:], args.evaluate[2:])
    check_budgets(args, model.folder)
    print(f"check: {args.model} and its texts are fit for use", file=sys.stderr)


def check_apart(sources: Mapping[str, "Source"], calibrate: list[str], evaluate: list[str]) -> None:
    """`UserError` where documents to evaluate on are among those to calibrate on."""
    from mxmoe_steps.data.sources import documents, key_of

    seen = {key_of(found) for part in parts(sources, calibrate) for found in documents(sources[part], "calibration")}
    for part in parts(sources, evaluate):
        keys = [key_of(found) for found in documents(sources[part], "test")]
        shared = sum(len(key) for key in keys if key in seen) / sum(map(len, keys))
        if shared > _MOST_SHARED:
            raise UserError(
                f"texts.{part}: {shared:.0%} of what it has to evaluate on is calibration text of"
                f" {', '.join(calibrate)} as well; name other `test_files` or another test_split"
            )


def check_budgets(args: argparse.Namespace, folder: "ModelFolder") -> None:
    """`UserError` for a budget that no allocation of the candidates meets, given what is fixed."""
    from mxmoe_steps.allocation.constraints import parse_constraints
    from mxmoe_steps.allocation.reachable import check_reachable
    from mxmoe_steps.existence import blocks_of
    from mxmoe_steps.schemes import parse_scheme

    constraints = parse_constraints(args.fix, args.min_bits, [], args.max_schemes, args.tie_gate_up)
    candidates = sorted(map(parse_scheme, args.candidates))
    check_reachable(blocks_of(folder, sizes=True), candidates, constraints, args.scope, args.problem)


def parts(sources: Mapping[str, "Source"], names: Iterable[str]) -> Iterator[str]:
    """Names of sources, those of its parts instead of a mix."""
    from mxmoe_steps.data.sources import MixText

    for name in names:
        source = sources[name]
        yield from source.mix if isinstance(source, MixText) else [name]


def main() -> None:
    """Command line."""
    parser = parser_for(__doc__)
    add_model(parser)
    parser.add_argument("--sources", required=True, help="JSON object: name -> text source")
    for step in ("trace", "calibrate", "evaluate"):
        parser.add_argument(
            f"--{step}", nargs="+", required=True, metavar="N", help=f"what {step} reads: SEQUENCES LENGTH NAME ..."
        )
    add = parser.add_argument
    add("--seed", type=natural, default=0)
    add("--device", default="cpu", help="where the steps will compute; must be there (default cpu)")
    add("--candidates", nargs="+", required=True, metavar="SCHEME", help="schemes that blocks may take")
    add("--problem", action="append", nargs=2, required=True, metavar=("GRANULARITY", "BITS"), help="of the sweep")
    add("--scope", default="model", choices=["layer", "model"], help="whether the budget holds in each layer")
    add("--fix", action="append", default=[], metavar="SELECTOR=SCHEME", help="as of frontier")
    add("--min-bits", action="append", default=[], metavar="SELECTOR=BITS", help="as of frontier")
    add("--max-schemes", type=positive, metavar="K", help="different schemes per layer")
    add("--tie-gate-up", action="store_true", help="gate and up of an expert take the same scheme")
    check(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
