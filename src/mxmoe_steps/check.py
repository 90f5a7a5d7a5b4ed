"""check: whether model and texts are what the steps need, before the first of them runs.

Compares the checkpoint with its model class by the headers of its files, and reads every text as the steps will:
their tokenizer, their sequences. Text to evaluate on must not be text to calibrate on. Writes nothing; exit status 2
and one line say what is wrong and what to do about it. A model of the hub is downloaded.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from mxmoe_steps.arguments import add_model, parser_for
from mxmoe_steps.errors import UserError, run_cli

if TYPE_CHECKING:
    from mxmoe_steps.data.sources import Source

_MOST_SHARED = 0.1  # of the characters of a text; short documents, such as headings, may well come twice


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for the first thing that is wrong."""
    from mxmoe_steps.data.reading import TextReader
    from mxmoe_steps.models.families import resolve_model
    from mxmoe_steps.models.streaming import StreamedModel

    path = resolve_model(args.model, code=args.trust_remote_code)
    StreamedModel(path, args.dtype, "cpu", args.trust_remote_code)
    reader = TextReader(path, args.sources, args.seed, args.trust_remote_code)
    for option, split in (("trace", "calibration"), ("calibrate", "calibration"), ("evaluate", "test")):
        sequences, length, *texts = getattr(args, option)
        for text in texts:
            reader.read(text, split, int(sequences), int(length))
    check_apart(reader.sources, args.calibrate[2:], args.evaluate[2:])
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
    parser.add_argument("--seed", type=int, default=0)
    check(parser.parse_args())


if __name__ == "__main__":
    run_cli(main)
