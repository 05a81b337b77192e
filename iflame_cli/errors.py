"""What goes wrong in a command."""


class CommandError(Exception):
    """Why a command could not do what it was asked for, in words for its user."""
