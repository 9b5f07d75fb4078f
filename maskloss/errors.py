"""The two ways in which a command ends early. Both print one line and no traceback."""


class InputError(Exception):
    """Something given is wrong: arguments, a file, an annotation. The command line exits with 2."""


class RunError(Exception):
    """A run under way cannot go on: a loss is not finite, the disk is full. The command line exits with 1."""
