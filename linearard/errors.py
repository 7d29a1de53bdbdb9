"""The one error class that users see."""


class UserError(Exception):
    """A user's mistake or an unusable input: one line that names the field or file and the remedy.

    Entry points print it without a traceback and exit with status 2.
    """
