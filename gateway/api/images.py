"""The operations on images, versions and builds (service reference, 1.3, 1.4 and 4)."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from gateway.accounts.model import Caller
from gateway.accounts.quotas import DISK_GIB
from gateway.images.artifact import parse_uri
from gateway.images.pipeline import read_hooks
from gateway.sessions.model import Build, Image, Session, Version

from .client_tokens import Remember, TokenMismatch
from .errors import Conflict, NotFound, QuotaExceeded, Validation
from .service import EGRESS, Service, check_image_arn, reply
from .tags import fault_of

_RESERVED = ("AWS_REGION", "AWS_LAMBDA_MICROVM_IMAGE_ARN", "AWS_LAMBDA_MICROVM_IMAGE_NAME", "AWS_LAMBDA_MICROVM_IMAGE_VERSION")
_ECHO = (
    "baseImageArn", "baseImageVersion", "buildRoleArn", "description", "codeArtifact", "logging", "egressNetworkConnectors",
    "cpuConfigurations", "resources", "additionalOsCapabilities", "hooks", "environmentVariables",
)  # fmt: skip
_DEFAULT_MIB = 2048
_ARN_TEXT = "Invalid ARN format: {}"
_CHIPS = {"x86_64": ("X86_64", "INTEL", "1"), "aarch64": ("ARM_64", "GRAVITON", "4")}
_BASE_VERSIONS = ("1", "0")
_BUSY = ("CREATING", "UPDATING", "DELETING")
_BASE_VERSION = re.compile(r"[0-9]+")


class Images:
    def __init__(self, service: Service, architecture: str) -> None:
        self._service = service
        self._store = service.store
        self._chip = _CHIPS[architecture]

    # ---- create, update, delete ----

    async def create_microvm_image(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        return await self._once(caller, "image", call, lambda remember: self._create(caller, call, remember))

    async def _create(self, caller: Caller, call: dict[str, Any], remember: Remember) -> dict[str, Any]:
        request = self._request(caller, call)
        if fault := fault_of(call.get("tags") or {}):
            raise Validation(fault)
        arn = self._service.image_arn(caller, call["name"])
        if arn in self._store.images:
            raise Validation(f"A MicroVM image with the name '{call['name']}' already exists in this account")
        own = [image for image in self._store.images.values() if image.account == caller.account]
        self._check_quota("images", len(own))
        self._check_builds(own)
        image, version = self._service.registry.create(arn, call["name"], request, call.get("tags") or {})
        return await self._begin(image, version, remember, tags=image.tags or None)

    async def update_microvm_image(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        return await self._once(caller, "image-update", call, lambda remember: self._update(caller, call, remember))

    async def _update(self, caller: Caller, call: dict[str, Any], remember: Remember) -> dict[str, Any]:
        image = self._find(call)
        self._check_idle(image)
        request = self._request(caller, call)
        self._check_quota("versions", len(image.versions))
        self._check_builds([image for image in self._store.images.values() if image.account == caller.account])
        return await self._begin(image, self._service.registry.update(image, request), remember)

    async def _once(
        self, caller: Caller, what: str, call: dict[str, Any], work: Callable[[Remember], Awaitable[dict[str, Any]]]
    ) -> dict[str, Any]:  # fmt: skip
        try:
            token = call.pop("clientToken", None)
            return await self._service.client_tokens.once(caller.account, what, token, call, work, self._stands)
        except TokenMismatch:
            raise Conflict("The client token was used before with other parameters.") from None

    def _stands(self, reply: dict[str, Any]) -> bool:
        """Whether the version that a reply says was made is there still, and of the same image."""
        image = self._store.images.get(reply["imageArn"])
        if image is None or image.id != reply["id"] or image.state in ("DELETING", "DELETE_FAILED"):
            return False
        version = image.find(reply["imageVersion"])
        return version is not None and version.state not in ("DELETING", "DELETE_FAILED")

    async def _begin(self, image: Image, version: Version, remember: Remember, **more: Any) -> dict[str, Any]:
        answer = self._describe_made(image, version) | more
        remember(answer)
        await self._service.registry.begin(image, version)
        return answer

    def _check_idle(self, image: Image) -> None:
        if image.state in (*_BUSY, "DELETE_FAILED"):
            raise Conflict(f"MicroVM Image is already in state: {image.state}")

    def _check_quota(self, what: str, have: int) -> None:
        limit = getattr(self._service.quotas, what)
        if limit and have >= limit:
            raise QuotaExceeded(f"The maximum number of {what} has been reached for this account: {limit}.")

    def _check_builds(self, own: list[Image]) -> None:
        limit = self._service.quotas.builds
        if limit and sum(image.state in ("CREATING", "UPDATING") for image in own) >= limit:
            raise QuotaExceeded("The maximum number of concurrent builds has been reached for this account.")

    async def delete_microvm_image(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        """Idempotent, as the model says: one that is being deleted, or was, is no error."""
        arn = call["imageIdentifier"]
        if arn not in self._store.images and await self._store.ended(arn) is not None:
            return {"imageIdentifier": arn, "state": "DELETED"}
        image = self._find(call)
        if image.state in ("CREATING", "UPDATING"):
            raise Validation(f"Cannot delete MicroVM image in its current state: {image.arn}")
        if image.state != "DELETING":
            self._check_unused(lambda session: session.image_arn == image.arn)
            await self._service.registry.delete(image)
        return {"imageIdentifier": image.arn, "state": "DELETING"}

    async def delete_microvm_image_version(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        """A version whose build is under way may go too: the build is called off. Idempotent as DeleteMicrovmImage."""
        arn, number = call["imageIdentifier"], call["imageVersion"]
        if await self._was_deleted(arn, number):
            return {"imageIdentifier": arn, "imageVersion": number, "state": "DELETED"}
        image, version = self._find_version(call)
        if version.state == "DELETING" or image.state == "DELETING":
            return {"imageIdentifier": arn, "imageVersion": number, "state": "DELETING"}
        if len(image.versions) == 1:
            raise Validation("This is the last version. Please delete the entire image")
        if image.state in _BUSY and version.state not in ("PENDING", "IN_PROGRESS"):
            raise Conflict(f"MicroVM Image is already in state: {image.state}")
        self._check_unused(lambda session: session.image == version.key)
        await self._service.registry.delete_version(image, version)
        return {"imageIdentifier": image.arn, "imageVersion": version.version, "state": "DELETING"}

    async def _was_deleted(self, arn: str, number: str) -> bool:
        image = self._store.images.get(arn)
        if image is None:
            return await self._store.ended(arn) is not None
        return image.find(number) is None and number in image.past_numbers

    def _check_unused(self, uses: Callable[[Session], bool]) -> None:
        if any(uses(session) and session.terminated_at is None for session in self._store.sessions.values()):
            raise Validation("Cannot delete microvm image with running microvms.")

    async def update_microvm_image_version(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        image, version = self._find_version(call)
        self._check_idle(image)
        if call["status"] == "ACTIVE" and version.state != "SUCCESSFUL":
            raise Validation(f"MicroVM Image version {version.version} is {version.state}: only a SUCCESSFUL one can be ACTIVE")
        await self._service.registry.set_status(image, version, call["status"])
        return self._describe_version(image, version)

    def _request(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        """Returns what a version is made from, with the service's defaults. Raises Validation."""
        request = {name: call[name] for name in _ECHO if call.get(name) is not None}
        base, version = call["baseImageArn"], call.get("baseImageVersion")
        check_image_arn(base, _ARN_TEXT)
        version = version or _BASE_VERSIONS[0]
        if not _BASE_VERSION.fullmatch(version):
            raise Validation(f"Invalid baseMicroVMImageVersion: {version}. Expected a single major version number (e.g., 1).")
        if base != self._service.managed_base or version not in _BASE_VERSIONS:
            raise Validation(f"No managed MicroVM Image with arn {base} and version {version} is available")
        request["baseImageVersion"] = f"{version}.0"
        if parse_uri(call["codeArtifact"].get("uri", "")) is None:
            raise Validation("CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>")
        request["resources"] = [{"minimumMemoryInMiB": self._size(call, base)}]
        request["egressNetworkConnectors"] = self._service.check_connectors(
            caller, call.get("egressNetworkConnectors") or [self._service.managed_connector("INTERNET_EGRESS")], EGRESS
        )
        for key, value in (call.get("environmentVariables") or {}).items():
            if key in _RESERVED:
                raise Validation(f"Environment variable key '{key}' is reserved")
            if "=" in key or "\0" in key:
                raise Validation(f"Environment variable key '{key}' must not contain '=' or a NUL character")
            if "\0" in value:
                raise Validation(f"The value of environment variable '{key}' must not contain a NUL character")
        enabled = read_hooks(request).enabled
        if "ready" not in enabled and any(name in enabled for name in ("run", "resume", "suspend", "terminate")):
            raise Validation(
                "The ready (/ready) MicroVM image hook must be enabled when any MicroVM lifecycle hook "
                "(run, resume, suspend, or terminate) is enabled."
            )
        return request

    def _size(self, call: dict[str, Any], base: str) -> int:
        resources = call.get("resources") or [{}]
        size = int(resources[0].get("minimumMemoryInMiB", _DEFAULT_MIB))
        if size not in DISK_GIB:
            raise Validation(
                f"The requested memory size of {size} MiB is not supported by base MicroVM image {base}. "
                f"Supported memory sizes in MiB are: {list(DISK_GIB)}."
            )
        return size

    # ---- forms ----

    def _describe_image(self, image: Image) -> dict[str, Any]:
        active, failed = image.latest_active, image.latest_failed
        return {
            "id": image.id,
            "imageArn": image.arn,
            "name": image.name,
            "state": image.state,
            "latestActiveImageVersion": active and active.version,
            "latestFailedImageVersion": failed and failed.version,
            "createdAt": round(image.created_at, 3),
        }

    def _describe_made(self, image: Image, version: Version) -> dict[str, Any]:
        """Returns what both CreateMicrovmImage and UpdateMicrovmImage answer."""
        return {
            **reply(_ECHO, version.request),
            **self._describe_image(image),
            "imageVersion": version.version,
            "updatedAt": round(image.updated_at, 3),
            "buildPhaseOverrides": None,
            "roleConfiguration": None,
        }

    def _describe_version(self, image: Image, version: Version) -> dict[str, Any]:
        return {
            **reply(_ECHO, version.request),
            "imageArn": image.arn,
            "imageVersion": version.version,
            "state": version.state,
            "status": version.status,
            "stateReason": None,
            "tags": None,
            "versionStateTimeBucket": f"{version.state}#{time.strftime('%y%m%d%H', time.gmtime(version.updated_at))}",
            "createdAt": round(version.created_at, 3),
            "updatedAt": round(version.updated_at, 3),
        }

    def _describe_build(self, version: Version, build: Build) -> dict[str, Any]:
        architecture, chipset, generation = self._chip
        return {
            "imageArn": version.image_arn, "imageVersion": version.version, "buildId": build.id, "buildState": build.state,
            "architecture": architecture, "chipset": chipset, "chipsetGeneration": generation,
            "createdAt": round(build.created_at, 3), "stateReason": build.reason, "terminationReasonCode": None,
        }  # fmt: skip

    # ---- reads ----

    def _find(self, call: dict[str, Any]) -> Image:
        arn = call["imageIdentifier"]
        image = self._store.images.get(arn)
        if image is None:
            raise NotFound(f"MicroVMImage not found for MicroVMImageID: {arn}")
        return image

    def _find_version(self, call: dict[str, Any]) -> tuple[Image, Version]:
        image = self._store.images.get(call["imageIdentifier"])
        version = image.find(call["imageVersion"]) if image is not None else None
        if image is None or version is None:
            raise NotFound(f"MicroVMImage not found for MicroVMImage: {call['imageIdentifier']}, Version: {call['imageVersion']}")
        return image, version

    async def get_microvm_image(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        image = self._find(call)
        return {**self._describe_image(image), "updatedAt": round(image.updated_at, 3), "tags": image.tags}

    async def list_microvm_images(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        own = [image for image in self._store.images.values() if image.account == caller.account]
        page, token = self._service.pager.page(f"images {caller.account}", own, lambda i: (i.created_at, i.id), call)
        wanted = call.get("nameFilter") or ""
        return {"items": [self._describe_image(image) for image in page if wanted in image.name], "nextToken": token}

    async def get_microvm_image_version(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        return self._describe_version(*self._find_version(call))

    async def list_microvm_image_versions(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        image = self._store.images.get(call["imageIdentifier"])
        if image is None:  # as it seems to be at the service: clients ask before they create
            return {"items": [], "nextToken": None}
        page, token = self._service.pager.page(image.arn, image.versions, lambda v: (-float(v.version),), call)
        return {"items": [self._describe_version(image, version) for version in page], "nextToken": token}

    async def list_microvm_image_builds(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        _, version = self._find_version(call)
        builds = [version.build] if version.build is not None and self._matches(call) else []
        page, token = self._service.pager.page(version.key, builds, lambda b: (-b.created_at, b.id), call)
        return {"items": [self._describe_build(version, build) for build in page], "nextToken": token}

    def _matches(self, call: dict[str, Any]) -> bool:
        wanted = (call.get("architecture"), call.get("chipset"), call.get("chipsetGeneration"))
        return all(want is None or want == have for want, have in zip(wanted, self._chip, strict=True))

    async def list_managed_microvm_images(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        at = self._based_at
        base = {"imageArn": self._service.managed_base, "createdAt": at, "updatedAt": at}
        page, token = self._service.pager.page("managed", [base], lambda item: (item["imageArn"],), call)
        return {"items": page, "nextToken": token}

    async def list_managed_microvm_image_versions(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        arn = check_image_arn(call["imageIdentifier"], _ARN_TEXT)
        if arn != self._service.managed_base:
            raise NotFound(f"MicroVMImage not found for MicroVMImageID: {arn}")
        at = self._based_at
        versions: list[dict[str, Any]] = [
            {
                "imageArn": arn, "imageVersion": number, "status": "AVAILABLE", "createdAt": at, "updatedAt": at,
                "supportedCpuConfigurations": [{"architecture": self._chip[0]}],
            }
            for number in _BASE_VERSIONS
        ]  # fmt: skip
        page, token = self._service.pager.page("managed versions", versions, lambda v: (-int(v["imageVersion"]),), call)
        return {"items": page, "nextToken": token}

    @property
    def _based_at(self) -> float:
        """When the local base image was made."""
        base = self._service.settings.cache / "base.tar"
        return round(base.stat().st_mtime, 3) if base.exists() else 0.0

    async def get_microvm_image_build(self, caller: Caller, call: dict[str, Any]) -> dict[str, Any]:
        _, version = self._find_version(call)
        build = version.build
        if build is None or build.id != call["buildId"]:
            raise NotFound(f"MicroVMImageBuild not found for BuildID: {call['buildId']}")
        answer = self._describe_build(version, build)
        if build.code_bytes is not None:
            answer["snapshotBuild"] = {
                "memorySnapshotSizeInBytes": build.memory_bytes,
                "codeInstallSizeInBytes": build.code_bytes,
                "diskSnapshotSizeInBytes": build.disk_bytes,
            }
        return answer
