"""The two kinds of error a user meets; the command line turns them into one sentence and an exit code."""


class KVError(RuntimeError):
    """Something failed while running (exit code 1): one clear sentence with the numbers and what to do."""

    exit_code = 1


class UsageError(KVError, ValueError):
    """What was asked for cannot be done (exit code 2): one clear sentence with the numbers and what to do."""

    exit_code = 2


class ContextFullError(UsageError):
    """The new tokens do not fit behind those already in the sequence."""
