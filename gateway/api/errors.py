"""API errors: typed, with the service's name, status and text (service reference, 1.1 and 1.4)."""

from __future__ import annotations


class ApiError(Exception):
    """An answer that is an error. `members` are its modelled detail members, sent as null where not set."""

    kind = "InternalServerException"
    status = 500
    members: tuple[str, ...] = ()

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def body(self) -> dict[str, object]:
        return {"message": str(self), **dict.fromkeys(self.members)}


class InternalServer(ApiError):
    pass


class Validation(ApiError):
    kind, status = "ValidationException", 400


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
