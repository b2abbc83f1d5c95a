"""What is stored about sessions and images."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.messages import Shape

from .states import State


def account_of(arn: str) -> str:
    """Returns the account of an ARN, which is its fifth part."""
    return arn.split(":", 5)[4]


class IdlePolicy(msgspec.Struct):
    """idlePolicy of RunMicrovm; seconds."""

    max_idle: int
    suspended: int
    auto_resume: bool


class Hooks(msgspec.Struct, frozen=True):
    """Which lifecycle hooks an image version has, and how long each may take in seconds (service reference, 5)."""

    port: int = 9000
    enabled: dict[str, int] = {}

    def timeout(self, name: str) -> int | None:
        """Returns seconds, or None when the hook is off."""
        return self.enabled.get(name)


class Archived(msgspec.Struct, frozen=True):
    """A sleeping session's files in the object store: key, bytes, SHA-256."""

    key: str
    size: int
    digest: str


class Session(msgspec.Struct):
    """One microVM. Times are seconds since the epoch."""

    id: str
    endpoint: str
    image_arn: str
    image_version: str
    image: str
    minimum_mib: int
    started_at: float
    max_duration: int
    state: State = State.PENDING
    incarnation: int = 0
    execution_role: str | None = None
    idle_policy: IdlePolicy | None = None
    ingress: list[str] = []
    egress: list[str] = []
    hooks: Hooks = Hooks()
    run_hook_payload: str | None = None
    log_group: str | None = None
    log_stream: str | None = None
    terminated_at: float | None = None
    reason: str | None = None
    suspended_at: float | None = None
    suspended_by: str = ""  # idle, api, stop
    snapshot_bytes: int = 0
    archived: Archived | None = None
    litter: list[str] = []  # keys that may be in the object store, and are nobody's: they are removed
    parked: int = 0  # streams that the edges hold while it sleeps
    accelerator: str = "tcg"
    is_aside: bool = False  # it ended by an error, and its files are in the quarantine, or on their way there
    refusal: str = ""  # why this host's hypervisor cannot load it, and which could; nobody is held for it meanwhile
    aside_seconds: float = 0.0  # in the quarantine, which are none of its lifetime

    @property
    def account(self) -> str:
        return account_of(self.image_arn)

    @property
    def expires_at(self) -> float:
        return self.started_at + self.max_duration + self.aside_seconds

    @property
    def resumes_on_request(self) -> bool:
        return self.idle_policy is not None and self.idle_policy.auto_resume


class Build(msgspec.Struct):
    """One build of an image version. `reason` holds "CODE: text" of a failure (service reference, 4)."""

    id: str
    state: str = "PENDING"
    created_at: float = 0.0
    reason: str | None = None
    phase: str = ""
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    code_bytes: int | None = None


class Version(msgspec.Struct):
    """One image version: the request that made it, and what came of it."""

    image_arn: str
    version: str
    request: dict[str, Any]
    created_at: float
    updated_at: float
    state: str = "PENDING"
    status: str = "ACTIVE"
    key: str = ""  # the directory under images/
    build: Build | None = None
    shape: Shape | None = None
    config: dict[str, Any] = {}

    @property
    def has_all_capabilities(self) -> bool:
        return "ALL" in (self.request.get("additionalOsCapabilities") or [])

    @property
    def is_runnable(self) -> bool:
        return self.state == "SUCCESSFUL" and self.status == "ACTIVE"


class Image(msgspec.Struct):
    """A MicroVM image: its versions, oldest first."""

    id: str
    arn: str
    name: str
    created_at: float
    updated_at: float
    state: str = "CREATING"
    reason: str | None = None
    tags: dict[str, str] = {}
    versions: list[Version] = []
    last_number: int = 0  # of a version: a number is never used again

    @property
    def account(self) -> str:
        return account_of(self.arn)

    def find(self, version: str) -> Version | None:
        return next((v for v in self.versions if v.version == version), None)

    @property
    def past_numbers(self) -> frozenset[str]:
        """Every version that there ever was."""
        return frozenset(f"{number}.0" for number in range(1, self.last_number + 1))

    @property
    def latest_active(self) -> Version | None:
        return next((v for v in reversed(self.versions) if v.is_runnable), None)

    @property
    def latest_failed(self) -> Version | None:
        return next((v for v in reversed(self.versions) if v.state == "FAILED"), None)


class Connector(msgspec.Struct):
    """A network connector of the customer's: VPC_EGRESS, the only kind (Lambda Core, CreateNetworkConnector)."""

    arn: str
    id: str
    name: str
    configuration: dict[str, Any]
    operator_role: str
    state: str
    modified_at: float
    reason: str = "Initial creation"
    update_status: str | None = None
    update_reason: str | None = None
    version: int = 1
    versions: list[tuple[int, float]] = []
    past: dict[int, tuple[dict[str, Any], str]] = {}  # of older versions: configuration and operator role
    tags: dict[str, str] = {}

    @property
    def account(self) -> str:
        return account_of(self.arn)

    @property
    def egress(self) -> dict[str, Any]:
        return self.configuration["VpcEgressConfiguration"]  # type: ignore[no-any-return]
