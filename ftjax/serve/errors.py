"""Errors in the form of OpenAI's API: `{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`."""

from typing import Any

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """A request that is refused, or that failed.

    Attributes:
        status: the HTTP status.
        param: the field of the request that is wrong, such as `messages.0.role`; or None.
        code: a word for programs, such as `model_not_found`; or None.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None, code: str | None = None) -> ApiError:
    """Return the error for a wrong field."""
    return ApiError(400, message, param, code)
