"""What a command raises when it cannot do what it was asked."""


class CommandError(Exception):
    """A mistake in what was asked, or something the machine lacks: shown as one line, without a traceback.

    The message says what was wrong, what is taken instead, and how to put it right.
    """
