"""The one exception for a user's mistake."""


class UserError(Exception):
    """A bad file, key, shape or option: one line that names the culprit and says what to do.

    Entry points print the line without a traceback and exit with a code that is not 0.
    """
