"""The operations on images, versions and builds (service reference, 1.3, 1.4 and 4)."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from gateway.images.artifact import parse_uri
from gateway.images.pipeline import DISK_GIB, read_hooks
from gateway.sessions.model import Build, Image, Version

from .errors import Conflict, NotFound, Validation
from .service import Service, check_image_arn, reply

_RESERVED = ("AWS_REGION", "AWS_LAMBDA_MICROVM_IMAGE_ARN", "AWS_LAMBDA_MICROVM_IMAGE_NAME", "AWS_LAMBDA_MICROVM_IMAGE_VERSION")
_ECHO = (
    "baseImageArn", "baseImageVersion", "buildRoleArn", "description", "codeArtifact", "logging", "egressNetworkConnectors",
    "cpuConfigurations", "resources", "additionalOsCapabilities", "hooks", "environmentVariables",
)  # fmt: skip
_ARN_TEXT = "Invalid ARN format: {}"
_CHIPS = {"x86_64": ("X86_64", "INTEL", "1"), "aarch64": ("ARM_64", "GRAVITON", "4")}
_BASE_VERSIONS = ("1", "0")
_BUSY = ("CREATING", "UPDATING", "DELETING")


class Images:
    def __init__(self, service: Service, architecture: str) -> None:
        self._service = service
        self._store = service.store
        self._chip = _CHIPS[architecture]
        self._creating = asyncio.Lock()

    # ---- create and update ----

    async def create_microvm_image(self, call: dict[str, Any]) -> dict[str, Any]:
        token = call.pop("clientToken", None)
        parameters = msgspec.json.encode(call, order="sorted").decode()
        async with self._creating:
            known = self._store.client_tokens.get(f"image:{token}") if token else None
            if known is not None and self._arn(call["name"]) in self._store.images:
                if known[0] != parameters:
                    raise Conflict("The client token was used before with other parameters.")
                return msgspec.json.decode(known[1])  # type: ignore[no-any-return]
            request = self._request(call)
            arn = self._arn(call["name"])
            if arn in self._store.images:
                raise Validation(f"A MicroVM image with the name '{call['name']}' already exists in this account")
            image, version = await self._service.registry.create(arn, call["name"], request, call.get("tags") or {})
            answer = self._describe_made(image, version)
            if token:
                self._store.put_client_token(f"image:{token}", parameters, msgspec.json.encode(answer).decode())
                await self._store.commit()
            return answer

    async def update_microvm_image(self, call: dict[str, Any]) -> dict[str, Any]:
        call.pop("clientToken", None)
        image = self._find(call)
        if image.state in _BUSY:
            raise Conflict(f"MicroVM Image is already in state: {image.state}")
        version = await self._service.registry.update(image, self._request(call))
        return self._describe_made(image, version)

    def _arn(self, name: str) -> str:
        settings = self._service.settings
        return f"arn:aws:lambda:{settings.region}:{settings.account}:microvm-image:{name}"

    def _request(self, call: dict[str, Any]) -> dict[str, Any]:
        """What a version is made from, with the service's defaults. Raises Validation."""
        request = {name: call[name] for name in _ECHO if call.get(name) is not None}
        base, version = call["baseImageArn"], call.get("baseImageVersion")
        check_image_arn(base, _ARN_TEXT)
        if base != self._service.managed_base or (version or "1").removesuffix(".0") not in _BASE_VERSIONS:
            raise Validation(f"No managed MicroVM Image with arn {base} and version {version or '1'} is available")
        request["baseImageVersion"] = f"{(version or '1').removesuffix('.0')}.0"
        if parse_uri(call["codeArtifact"].get("uri", "")) is None:
            raise Validation("CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>")
        request.setdefault("resources", [{"minimumMemoryInMiB": 2048}])
        size = request["resources"][0]["minimumMemoryInMiB"] if request["resources"] else 2048
        if size not in DISK_GIB:
            raise Validation(
                f"The requested memory size of {size} MiB is not supported by base MicroVM image {base}. "
                f"Supported memory sizes in MiB are: {list(DISK_GIB)}."
            )
        request["resources"] = [{"minimumMemoryInMiB": size}]
        request["egressNetworkConnectors"] = self._service.check_connectors(
            call.get("egressNetworkConnectors") or [self._service.managed_connector("INTERNET_EGRESS")], ("INTERNET_EGRESS",)
        )
        for key in call.get("environmentVariables") or {}:
            if key in _RESERVED:
                raise Validation(f"Environment variable key '{key}' is reserved")
        enabled = read_hooks(request).enabled
        if "ready" not in enabled and any(name in enabled for name in ("run", "resume", "suspend", "terminate")):
            raise Validation(
                "The ready (/ready) MicroVM image hook must be enabled when any MicroVM lifecycle hook "
                "(run, resume, suspend, or terminate) is enabled."
            )
        return request

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
        return {
            **reply(_ECHO, version.request),
            **self._describe_image(image),
            "imageVersion": version.version,
            "updatedAt": round(image.updated_at, 3),
            "tags": image.tags or None,
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
        arn = check_image_arn(call["imageIdentifier"], _ARN_TEXT)
        image = self._store.images.get(arn)
        if image is None:
            raise NotFound(f"MicroVMImage not found for MicroVMImageID: {arn}")
        return image

    def _find_version(self, call: dict[str, Any]) -> tuple[Image, Version]:
        image = self._store.images.get(check_image_arn(call["imageIdentifier"], _ARN_TEXT))
        version = image.find(call["imageVersion"]) if image is not None else None
        if image is None or version is None:
            raise NotFound(f"MicroVMImage not found for MicroVMImage: {call['imageIdentifier']}, Version: {call['imageVersion']}")
        return image, version

    async def get_microvm_image(self, call: dict[str, Any]) -> dict[str, Any]:
        image = self._find(call)
        return {**self._describe_image(image), "updatedAt": round(image.updated_at, 3), "tags": image.tags or None}

    async def list_microvm_images(self, call: dict[str, Any]) -> dict[str, Any]:
        page, token = self._service.pager.page("images", list(self._store.images.values()), lambda i: [i.created_at, i.id], call)
        wanted = call.get("nameFilter") or ""
        return {"items": [self._describe_image(image) for image in page if wanted in image.name], "nextToken": token}

    async def get_microvm_image_version(self, call: dict[str, Any]) -> dict[str, Any]:
        return self._describe_version(*self._find_version(call))

    async def list_microvm_image_versions(self, call: dict[str, Any]) -> dict[str, Any]:
        image = self._find(call)
        page, token = self._service.pager.page(image.arn, image.versions, lambda v: [-float(v.version)], call)
        return {"items": [self._describe_version(image, version) for version in page], "nextToken": token}

    async def list_microvm_image_builds(self, call: dict[str, Any]) -> dict[str, Any]:
        _, version = self._find_version(call)
        builds = [version.build] if version.build is not None and self._matches(call) else []
        page, token = self._service.pager.page(version.key, builds, lambda b: [-b.created_at, b.id], call)
        return {"items": [self._describe_build(version, build) for build in page], "nextToken": token}

    def _matches(self, call: dict[str, Any]) -> bool:
        wanted = (call.get("architecture"), call.get("chipset"), call.get("chipsetGeneration"))
        return all(want is None or want == have for want, have in zip(wanted, self._chip, strict=True))

    async def get_microvm_image_build(self, call: dict[str, Any]) -> dict[str, Any]:
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

    # ---- delete ----

    async def delete_microvm_image(self, call: dict[str, Any]) -> dict[str, Any]:
        image = self._find(call)
        if image.state in _BUSY:
            raise Validation(f"Cannot delete MicroVM image in its current state: {image.arn}")
        if any(s.image_arn == image.arn and s.terminated_at is None for s in self._store.sessions.values()):
            raise Validation("Cannot delete microvm image with running microvms.")
        await self._service.registry.delete(image)
        return {"imageIdentifier": image.arn, "state": "DELETING"}
