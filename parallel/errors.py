"""Errors that are explained to the user in one message, without a trace."""


class UserError(Exception):
    """An error with `problems`: each names what is, what must be, and the nearest valid value.

    A command that ends with one leaves with `status`.
    """

    status = 1

    def __init__(self, *problems: str):
        self.problems = [problem for problem in problems if problem]
        super().__init__("\n".join(self.problems))


class ConfigError(UserError, ValueError):
    """A mistake in the configuration or on the command line."""

    status = 2


class DataError(UserError, ValueError):
    """Data that cannot be read, or that can be read in more than one way."""

    status = 2


class StorageError(UserError):
    """A disk or folder that cannot be written, or whose files are not as written."""


class NumericalError(UserError):
    """A loss, gradient, weight or copy of one that is not what it must be."""
