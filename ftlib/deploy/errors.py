"""What a request is refused with."""


class RequestError(Exception):
    """A request that is answered with an error: an HTTP status and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
