"""The one exception class for what a user can mend."""


class UserError(ValueError):
    """Bad input: a file, an option or a combination of them that cannot work.

    The message is one line that names the file or option, what was found, what was expected and
    what to do. Scripts print it without a traceback and exit with status 1 (see ``cli.run``).
    """
