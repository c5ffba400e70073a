"""The errors for what a user can cause."""


class InputError(ValueError):
    """Something the user gave can't be used; the message says value, constraint and remedy."""


class ToldElsewhereError(InputError):
    """An `InputError` of all processes of a run, which another of them prints."""
