"""The one exception a user is meant to read, and how a step ends on it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message names the file or key and says how to fix it; no traceback is shown."""


def run_cli(main: Callable[[], None]) -> None:
    """Run a step's ``main``; a `UserError` becomes one line on stderr and exit status 2.

    So does what the operating system refuses: a full disk, no permission.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
