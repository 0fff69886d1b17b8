"""What a client is told when something is wrong: a status and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_vlm_pipes.errors import (
    CheckpointError,
    ContextTooLong,
    EngineClosed,
    InputError,
    MediaError,
    OutOfBudget,
    UnknownAdapter,
)


@dataclass(eq=False)
class ApiError(Exception):
    """A refusal. param: the parameter that is to blame; code: a word for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}
_CODES: dict[type[InputError], str] = {
    ContextTooLong: "context_length_exceeded",
    MediaError: "invalid_media",
    OutOfBudget: "out_of_budget",
    UnknownAdapter: "adapter_not_found",
}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def api_error(error: Exception, params: Mapping[str, str] | None = None) -> ApiError:
    """The refusal that one of the package's own exceptions means; others are raised again.

    params: what the request calls our options, and its prompt under the name "prompt".
    """
    if isinstance(error, ApiError):
        return error
    message = " ".join(str(error).split())
    if isinstance(error, InputError):
        name = error.param or "prompt"
        return bad_request(message, (params or {}).get(name, name), _CODES.get(type(error)))
    if isinstance(error, EngineClosed):
        return ApiError(503, message, code="model_unloaded", headers={"Retry-After": "5"})
    if isinstance(error, CheckpointError):
        return ApiError(503, message, "model", "model_not_loaded")
    raise error
