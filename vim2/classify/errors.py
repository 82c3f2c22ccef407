"""The one exception of this package."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Something that the user can put right: the message says what is wrong and how, in one line.

    Args:
        message: What is wrong, and the remedy.
        one_process: Only this process of several knows of it, so that it has to speak up itself.
    """

    def __init__(self, message: str, one_process: bool = False):
        super().__init__(" ".join(str(message).split()))
        self.one_process = one_process
