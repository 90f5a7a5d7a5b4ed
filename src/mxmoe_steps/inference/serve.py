"""``transformers serve`` for packed checkpoints: the same command with the same options.

    python -m mxmoe_steps.inference.serve FOLDER --continuous-batching --device cuda --dtype bfloat16

Importing this package is all that it adds. It needs what `transformers serve` needs: ``transformers[serving]``.
"""

import importlib
import sys


def main() -> None:
    """Command line."""
    sys.argv[:1] = ["transformers", "serve"]
    importlib.import_module("transformers.cli.transformers").main()


if __name__ == "__main__":
    main()
