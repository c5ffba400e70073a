"""The error for what a user can cause."""


class InputError(ValueError):
    """Something the user gave can't be used; the message says value, constraint and remedy."""
