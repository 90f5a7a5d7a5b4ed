"""The one exception a user is meant to read, and how a step ends on it."""

import errno
import sys
from collections.abc import Callable

_NO_MEMORY = ("MemoryError", "can't allocate memory", "out of memory", "Cannot allocate memory")
MORE_MEMORY = "run fewer jobs at a time, or raise the limit of shell or cluster; on a GPU, set runtime.device: cpu"


class UserError(Exception):
    """Bad input. The message names the file or key and says how to fix it; no traceback is shown."""


def out_of_memory(text: str) -> bool:
    """Whether an error, with its class, says that memory ran out: that of Python, PyTorch's allocators or a GPU."""
    return any(said in text for said in _NO_MEMORY)


def run_cli(main: Callable[[], None]) -> None:
    """Run a step's ``main``; a `UserError` becomes one line on stderr and exit status 2.

    So does what the operating system refuses: a full disk, no permission, memory.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, OSError, RuntimeError) as error:
        first, *_ = str(error).splitlines() or [""]
        if getattr(error, "errno", None) == errno.ENOMEM or out_of_memory(f"{type(error).__name__}: {error}"):
            print(f"error: not enough memory ({first or 'MemoryError'}); {MORE_MEMORY}", file=sys.stderr)
            sys.exit(2)
        if not isinstance(error, OSError):
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
