"""Errors of the server: what a client gets, with an HTTP status and a body as the OpenAI interface has it."""

import math
from typing import Any, ClassVar

from ..core.errors import MnemicError


class ServingError(MnemicError):
    """Base. status: of HTTP; type, code: as in the body; param: the field of the request that is meant, if one is.
    again: seconds after which the same request may go through, where waiting can help."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    again: ClassVar[int | None] = None

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message)
        self.param = param

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.again is None else {"Retry-After": str(self.again)}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(ServingError, ValueError):
    """A request whose content cannot be used."""

    status, type, code = 400, "invalid_request_error", "invalid_value"


class TooLarge(InvalidRequest):
    """More bytes or tokens than the server takes."""

    status, code = 413, "too_large"


class Unauthorised(ServingError):
    """No key, or one that is not known."""

    status, type, code = 401, "authentication_error", "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class SessionNotFound(ServingError):
    """No such session, or not this tenant's."""

    status, type, code = 404, "invalid_request_error", "session_not_found"


class UnknownModel(ServingError):
    """The server has no model of that name."""

    status, type, code = 404, "invalid_request_error", "model_not_found"


class SessionBusy(ServingError):
    """Somebody else is writing to the session."""

    status, type, code = 409, "conflict_error", "session_busy"


class VersionConflict(ServingError):
    """The session has moved on since it was read."""

    status, type, code = 409, "conflict_error", "version_conflict"


class Overloaded(ServingError):
    """More is waiting than the server takes; retry_after: seconds until it is likely to have room."""

    status, type, code = 429, "rate_limit_error", "overloaded"

    def __init__(self, message: str, *, retry_after: float, param: str | None = None):
        super().__init__(message, param=param)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


class RateExceeded(Overloaded):
    """The tenant has used up what it may have in a minute; retry_after: seconds until it may go on."""

    code = "rate_limit_exceeded"


class QuotaExceeded(ServingError):
    """The tenant has as many sessions or bytes as it may."""

    status, type, code = 429, "insufficient_quota", "quota_exceeded"


class StepFailed(ServingError):
    """The model failed on this request."""

    status, code = 500, "step_failed"


class OutOfMemory(ServingError):
    """The device has no room for this request."""

    status, code, again = 503, "out_of_memory", 5


class StoreUnavailable(ServingError):
    """The session store does not answer, or its disk is full."""

    status, code, again = 503, "store_unavailable", 5


class SessionDamaged(StoreUnavailable):
    """A session's stored state is not what was written."""

    code, again = "session_damaged", None


class SessionUnusable(ServingError):
    """A session's state does not fit the model that is served."""

    code = "session_unusable"


class ShuttingDown(ServingError):
    """The server takes no more requests."""

    status, code, again = 503, "shutting_down", 5


class DeadlineExceeded(ServingError):
    """The request took longer than it may."""

    status, type, code = 504, "timeout_error", "deadline_exceeded"
