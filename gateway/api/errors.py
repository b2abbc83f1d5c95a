"""API errors: typed, with the service's name, status and text (service reference, 1.1 and 1.4)."""

from __future__ import annotations

from collections.abc import Mapping

from botocore.model import StructureShape


class ApiError(Exception):
    """An answer that is an error. `members` are its modelled detail members, sent as null where not set."""

    kind = "InternalServerException"
    status = 500
    text_member = "message"
    members: tuple[str, ...] = ()

    def __init__(self, message: str, retry_after: int | None = None, status: int = 0, **details: str) -> None:
        super().__init__(message)
        self.status = status or self.status
        self.retry_after = retry_after
        self.details = details

    def body(self) -> dict[str, object]:
        return {self.text_member: str(self), **{name: self.details.get(name) for name in self.members}}


class InternalServer(ApiError):
    """Stands also for ServiceException, where an operation models that instead: `as_modelled` gives it."""


class Validation(ApiError):
    kind, status = "ValidationException", 400


class Unserializable(ApiError):
    """The body does not fit the model's types: recorded with a capital member, and no further detail."""

    kind, status, text_member = "SerializationException", 400, "Message"


class AccessDenied(ApiError):
    kind, status = "AccessDeniedException", 403


class NotFound(ApiError):
    kind, status = "ResourceNotFoundException", 404
    members = ("resourceId", "resourceType")


class Conflict(ApiError):
    kind, status = "ConflictException", 409
    members = ("resourceId", "resourceType")


class Throttling(ApiError):
    kind, status = "ThrottlingException", 429
    members = ("serviceCode", "quotaCode")


class QuotaExceeded(ApiError):
    kind, status = "ServiceQuotaExceededException", 402
    members = ("resourceId", "resourceType", "serviceCode", "quotaCode")


class InsufficientCapacity(ApiError):
    kind, status = "InsufficientCapacityException", 500


class SignatureError(ApiError):
    """The request's signature is missing or wrong; `kind` says how."""

    status = 403

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class RequestTimeout(ApiError):
    kind, status = "RequestTimeoutException", 408


# ---- Lambda Core and tags: `Type` says whose fault it was, absent members are left out ----


class CoreError(ApiError):
    status = 400
    fault = "User"

    def body(self) -> dict[str, object]:
        return {"Type": self.fault, self.text_member: str(self), **self.details}


class InvalidParameter(CoreError):
    kind = "InvalidParameterValueException"


class ResourceConflict(CoreError):
    kind, status = "ResourceConflictException", 409


class ConnectorLimit(CoreError):
    kind = "NetworkConnectorLimitExceededException"


class CoreNotFound(ApiError):
    """Recorded: the capital member alone."""

    kind, status, text_member = "ResourceNotFoundException", 404, "Message"


class TooManyRequests(CoreError):
    kind, status = "TooManyRequestsException", 429


class ServiceFault(CoreError):
    kind, status, fault = "ServiceException", 500, "Service"


def as_modelled(error: ApiError, errors: Mapping[str, StructureShape]) -> ApiError:
    """Returns the error that stands for `error` in an operation that models `errors`: Lambda Core and the classic tags have names of their
    own for what was our fault, and for calls that come too fast."""
    if isinstance(error, InternalServer) and ServiceFault.kind in errors:
        fault = ServiceFault(str(error), error.retry_after)
        fault.text_member = next(name for name in errors[fault.kind].members if name.lower() == "message")
        return fault
    if isinstance(error, Throttling) and TooManyRequests.kind in errors:
        fast = TooManyRequests(str(error), error.retry_after)
        if "Reason" in errors[fast.kind].members:
            fast.details = {"Reason": "CallerRateLimitExceeded"}
        return fast
    return error
