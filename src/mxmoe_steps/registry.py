"""Classes by the names that configurations use: ours, and those of a user's modules (`mxmoe_steps.extensions`)."""

import re
from collections.abc import Callable
from typing import TypeVar

from mxmoe_steps.errors import UserError

NAME = r"[a-z][a-z0-9_]*"
Kind = TypeVar("Kind")


class Registry(dict[str, type[Kind]]):
    """Name -> class; ``what`` is what the classes are, for messages."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def register(self, name: str) -> Callable[[type[Kind]], type[Kind]]:
        """Decorator of a class; `UserError` for a name that is taken or malformed."""
        if not re.fullmatch(NAME, name):
            raise UserError(f"{self.what} {name!r}: a name is of small letters, digits and _, a letter first")

        def add(kind: type[Kind]) -> type[Kind]:
            if name in self:
                taken = f"{self[name].__module__}.{self[name].__name__}"
                raise UserError(f"{self.what} {name!r} of {kind.__module__} is taken by {taken}; choose another name")
            self[name] = kind
            return kind

        return add

    def of(self, name: str) -> type[Kind]:
        """The class of that name; `UserError` lists the names that there are."""
        if name not in self:
            raise UserError(
                f"{self.what} {name!r}: known are {', '.join(self)}; the module of another one goes into extensions"
            )
        return self[name]
