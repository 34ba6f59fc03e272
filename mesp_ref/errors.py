"""The one exception a user of mesp_ref can cause."""


class MespRefError(ValueError):
    """A mistake in what the user gave: a file, a field, a tensor, an argument.

    The message is one line that names where, what was found, what was expected and what to do.
    The command line prints that line and exits with code 2.
    """
