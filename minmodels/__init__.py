"""Thin models on top of minkernels, one a file, and the command line that trains and samples them."""


class UserError(Exception):
    """Something that the user can mend: the command line prints it as one line, without a traceback."""

    status = 2


class Interrupted(UserError):
    """again: the command that goes on, if there is one."""

    def __init__(self, message: str, signal: int, again: str = ""):
        super().__init__(f"{message}. To go on: {again}" if again else message)
        self.message, self.signal = message, signal
        self.status = 128 + signal  # what a shell reports for a process that the signal ended
