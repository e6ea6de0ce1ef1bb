"""Errors reported to the user as one message, without a traceback."""


class UserError(Exception):
    """An error with a list of `problems`: actual value, expected value, nearest valid value.

    A command that raises it exits with `status`.
    """

    status = 1

    def __init__(self, *problems: str):
        self.problems = [problem for problem in problems if problem]
        super().__init__("\n".join(self.problems))


class ConfigError(UserError, ValueError):
    """An invalid configuration or command line."""

    status = 2


class DataError(UserError, ValueError):
    """Unreadable or ambiguous data."""

    status = 2


class StorageError(UserError):
    """A disk or folder that cannot be written, or whose files are corrupt."""


class NumericalError(UserError):
    """A loss, gradient, weight or replica with an invalid value."""
