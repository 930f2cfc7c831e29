"""The one exception that means: the input is wrong, and here is what to do about it."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a file, an argument or the surroundings, never in avzero itself.

    The message is one line that names the file, row or field and the remedy. The command line
    prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
