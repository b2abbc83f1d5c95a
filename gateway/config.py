"""Settings: one typed tree, read from `torpor.toml` in the instance's root, then from TORPOR_* variables.

`TORPOR_EDGE__WORKERS=4` sets `edge.workers`. Deadlines and bounds that an operator may want otherwise stand here with their reasons;
those that follow from a protocol or from another of our constants stand beside the code that keeps them.
"""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from .messages import HOST_RULE

_PREFIX = "TORPOR_"  # of environment variables
END_SECONDS = 20.0  # of a stop: for processes that have nothing left to do but to end
LOCAL_BASE = "public.ecr.aws/lambda/microvms:al2023-minimal"


class ConfigError(Exception):
    """A setting is wrong; the text names it and what it may be."""


class _Section(BaseModel):
    """A name that is not known is refused, as it may be another one misspelt."""

    model_config = ConfigDict(extra="forbid")


def is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class Edge(_Section):
    """The endpoint proxy."""

    addresses: list[str] = Field(["127.0.0.1", "::1"], description="where endpoints are served")
    port: int = Field(0, ge=0, le=65535, description="0: 443, else 8443, else the next free port; kept for the instance")
    workers: int = Field(0, ge=0, le=256, description="0: one per processor")
    held_requests: int = Field(2048, ge=1, description="per session and worker, which holds four times that; beyond: 429")
    held_bytes: int = Field(16 << 20, ge=65536, description="of bodies read while held; a worker holds four times that; beyond: 429")
    hold_seconds: float = Field(30.0, gt=0, description="how long a request waits for its session; then 502")
    connect_seconds: float = Field(
        3.0, gt=0, description="how long an application that has listened, and refuses, is tried again; then 502"
    )
    head_bytes: int = Field(32 << 10, ge=1024, description="of a request's or response's head; beyond: 431 or 502")
    head_fields: int = Field(200, ge=16, description="of a head's fields; beyond: 431 or 502")
    head_seconds: float = Field(20.0, gt=0, description="to receive a whole head, from its first byte; then 408")
    body_seconds: float = Field(60.0, gt=0, description="a request's body may stand still this long; then 408")
    body_bytes_per_second: int = Field(10, ge=0, description="of a body, over body_seconds; a slower one is answered 408; 0: no bound")
    half_close_seconds: float = Field(
        10.0, gt=0, description="a client that has ended its half is taken to be gone when nothing has passed for this long"
    )
    idle_seconds: float = Field(300.0, gt=0, description="an idle client connection, or one that reads nothing, is kept this long")
    origin_idle_seconds: float = Field(20.0, gt=0, description="an idle connection to an application is kept this long")
    drain_seconds: float = Field(30.0, ge=0, description="a worker that is replaced finishes what it has within this time")
    proxy_protocol_from: list[str] = Field([], description="networks of load balancers, which send a PROXY header of version 2")
    forwarded: bool = Field(False, description="tell applications X-Forwarded-For, -Proto and -Host; a client's own are removed")
    via: str = Field("", pattern=r"^[A-Za-z0-9._-]*$", description="a name to add in Via, to requests and answers; empty: none")
    redirect_port: int = Field(0, ge=0, le=65535, description="answer plain HTTP on this port with a redirect to HTTPS; 0: no")
    certificate: str = Field("", description="a PEM chain; with `key` instead of the development authority's; kept up with")
    key: str = Field("", description="the certificate's private key, PEM; root only: workers get a copy")
    ocsp: str = Field("", description="an OCSP answer (DER) to staple; kept up with")
    access_log: str = Field("", description="a file for one JSON line a request; empty: none")
    limits: str = Field(
        "none", pattern="^(none|aws|custom)$", description="of each endpoint: none, the service's by size, or the next three"
    )
    limit_connections: int = Field(1024, ge=1, description="custom: connections to one microVM")
    limit_requests_per_second: int = Field(10_000, ge=1, description="custom: requests a second to one microVM; beyond: 429")
    limit_bytes_per_second: int = Field(1 << 30, ge=1024, description="custom: bytes a second of one microVM; beyond: slower")
    server_timing: bool = Field(True, description="say in Server-Timing what a held request waited for")

    @property
    def worker_count(self) -> int:
        return self.workers or os.cpu_count() or 1


class Api(_Section):
    """The control plane's listener, SigV4-checked."""

    address: str = "127.0.0.1"
    port: int = Field(4700, ge=0, le=65535)
    tls: bool = Field(False, description="HTTPS; beyond loopback the service does not start without")
    certificate: str = Field("", description="a PEM chain, with `key`; empty: one of the instance's own authority; kept up with")
    key: str = Field("", description="the certificate's private key, PEM; root only: control gets a copy")
    names: list[str] = Field([], description="names and addresses of the API that its own certificate has, beside address and localhost")
    metrics_address: str = Field("127.0.0.1", description="where metrics and health are served; beyond loopback by HTTPS, for a token")
    metrics_port: int = Field(4701, ge=0, le=65535)
    metrics_token_file: str = Field("", description="its only line is the bearer token of who may read metrics; root's alone to read")
    connections: int = Field(1024, ge=16, description="at once, metrics' included; beyond, one that has shown nothing yet makes room")
    connections_per_peer: int = Field(512, ge=8, description="at once from one address, or one /64 of IPv6")
    head_seconds: float = Field(10.0, gt=0, description="for a connection's first whole head, TLS included; then it is closed")
    body_seconds: float = Field(20.0, gt=0, description="for a request's body; then 408")
    clock_skew_seconds: int = Field(900, ge=1, description="a signature older or newer is refused (SigV4: 15 minutes)")

    @model_validator(mode="after")
    def _check_wire(self) -> Api:
        """Session tokens and STS's secrets would be anybody's on the way."""
        if bool(self.certificate) != bool(self.key):
            raise ValueError("api.certificate and api.key go together: set both, or neither")
        if self.certificate and not self.tls:
            raise ValueError("api.certificate is for api.tls: set that too")
        if not is_loopback(self.address) and not self.tls:
            raise ValueError(f"api.address {self.address} is beyond loopback, where credentials may be read on their way: set api.tls")
        if not is_loopback(self.metrics_address) and not (self.tls and self.metrics_token_file):
            raise ValueError(f"api.metrics_address {self.metrics_address} is beyond loopback: set api.tls and api.metrics_token_file")
        return self


class ObjectStore(_Section):
    """Where artifacts are read from."""

    embedded: bool = Field(True, description="run moto's S3 server beside the service, for demos and tests")
    port: int = Field(4702, ge=0, le=65535)
    endpoint: str = Field("", description="another S3 endpoint; empty: the embedded one, or AWS itself")
    access_key: str = Field("", description="for another endpoint than the embedded one")
    secret_key: str = Field("", description="for another endpoint than the embedded one")
    secret_key_file: str = Field("", description="its only line is that secret; root's alone to read")
    buckets: dict[str, list[str]] = Field(
        {}, description="account numbers to names of buckets whose artifacts are theirs to build from; the rest are the first account's"
    )
    addressing: str = Field("path", pattern="^(path|virtual|auto)$", description="how buckets are named to the endpoint")

    @field_validator("buckets")
    @classmethod
    def _check_buckets(cls, buckets: dict[str, list[str]]) -> dict[str, list[str]]:
        for number in buckets:
            if not re.fullmatch(r"[0-9]{12}", number):
                raise ValueError(f"{number} is no account's number, which has twelve digits")
        return buckets

    @property
    def is_embedded(self) -> bool:
        return self.embedded and not self.endpoint

    def may_read(self, account: str, home: str, bucket: str) -> bool:
        """Whether a bucket is an account's, for a store that we ask with the operator's login; `home` is the first account."""
        owners = [number for number, buckets in self.buckets.items() if bucket in buckets]
        return account in owners if owners else account == home


class Login(_Section):
    """A registry's login, for builds with some roles."""

    user: str
    password_file: str = Field(description="its only line is the password; control's user must be able to read it")
    roles: list[str] = Field(description="build role ARNs that may use it; * matches any run of characters")


_STORE_LEAST_MIB = 1024  # for the local base, and the layers of a build


class Images(_Section):
    """Image builds."""

    base_names: list[str] = Field([LOCAL_BASE], description="names after FROM that mean the base, whatever their tag and digest")
    base: str = Field(
        "auto", pattern="^(auto|registry|local)$",
        description="what base_names mean: the first name's image, pulled once for this host; a local one; auto: pulled where it can be",
    )  # fmt: skip
    pull: bool = Field(False, description="pull other base images from their registries")
    logins: dict[str, Login] = Field({}, description="registry hosts (host or host:port) to logins for private base images")
    ecr_endpoint: str = Field("", description="an ECR endpoint whose GetAuthorizationToken the build role is asked for; empty: AWS's own")
    registry_ca: str = Field("", description="PEM file of authorities that registries' certificates may have, beside the host's")
    concurrent_builds: int = Field(3, ge=1, description="on this host; accounts that wait take turns")
    account_builds: int = Field(2, ge=1, description="of one account, which leaves the rest to others")
    build_memory_mib: int = Field(3072, ge=512, description="of one container build, its daemon included")
    build_processes: int = Field(4096, ge=256, description="of one container build, threads and its daemon's included")
    build_seconds: float = Field(1800.0, gt=0, description="of one container build; then it is ended")
    build_log_mib: int = Field(64, ge=1, description="that a container build may say; beyond, it is ended")
    cache_mib: int = Field(10_240, ge=0, description="of layers and cache mounts that stay for an account's next builds")
    store_mib: int = Field(
        32_768, ge=0, description="of an account's layers, those of a build under way included; an inode for each 16 KiB; 0: no bound"
    )
    cache_days: float = Field(30.0, ge=0, description="an account that has built nothing for so long begins afresh")
    archive_bytes: int = Field(512 << 20, ge=1024, description="of an artifact")
    unpacked_bytes: int = Field(2 << 30, ge=1024, description="of an artifact's files in all")
    unpacked_entries: int = Field(250_000, ge=1)
    ratio: int = Field(1100, ge=2, description="unpacked to packed; beyond is a bomb (one layer of deflate reaches 1032)")
    settle_seconds: float = Field(2.0, ge=0, description="an application without ready hook and port gets this long before its snapshot")
    run_ahead: dict[str, str] = Field(
        {}, description="image names whose launches may come from microVMs that ran ahead, and what to ask of them: /path, or :port/path"
    )
    start_seconds: float = Field(120.0, gt=0, description="for all EXPOSEd TCP ports to listen, where no ready hook is enabled")

    @model_validator(mode="after")
    def _check_store(self) -> Images:
        """What stays must leave room for a build."""
        if self.store_mib and self.store_mib < self.cache_mib + _STORE_LEAST_MIB:
            raise ValueError(
                f"images.store_mib = {self.store_mib} leaves a build no {_STORE_LEAST_MIB} MiB beside images.cache_mib = {self.cache_mib}"
            )
        return self


class Limits(_Section):
    """What accounts and the host may be asked for."""

    min_idle_seconds: int = Field(60, ge=1, description="smallest maxIdleDurationSeconds (the service's: 60)")
    profile: str = Field("none", pattern="^(none|small|aws)$", description="an account's quotas: the service's, a new account's, or none")
    memory_mib: int = Field(0, ge=0, description="an account's sum of minimum sizes, RUNNING and SUSPENDED; 0: the profile's")
    microvms: int = Field(2048, ge=0, description="of an account, RUNNING and SUSPENDED; 0: no bound")
    disk_gib: int = Field(0, ge=0, description="an account's sum of disks, RUNNING and SUSPENDED; 0: no bound")
    builds: int = Field(100, ge=0, description="of an account, those that wait included, where the profile has no number; 0: no bound")
    reserve_mib: int = Field(1024, ge=0, description="of the host's memory, never given to microVMs")
    guest_mib: int = Field(0, ge=0, description="of memory that a guest sees at most; 0: three quarters of the host's")
    growth_mib: int = Field(96, ge=1, description="private memory that a launched or resumed microVM is expected to need")
    disk_reserve_mib: int = Field(1024, ge=0, description="free disk below which nothing is launched")
    disk_percent: int = Field(
        2, ge=0, le=100, description="of each microVM's disk that a launch must leave room for; 100: no guest can take another's"
    )


_POOL_LEAST = 4  # the veth to the outside, and one link
_NO_POOL = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")
_HOST_RULE = re.compile(HOST_RULE)
_PORTS = re.compile(r"(?:tcp|udp):(\d{1,5})(?:-(\d{1,5}))?")


def _network(text: str, where: str = "") -> ipaddress.IPv4Network:
    """Raises ValueError."""
    try:
        return ipaddress.IPv4Network(text)
    except ValueError as error:
        raise ValueError(f"{where}{text} is no IPv4 network: {error}") from error


class Egress(_Section):
    """The way out of microVMs (docs/security.md)."""

    closed: bool = Field(False, description="no microVM gets a way out, whatever connector it names")
    uplink: str = Field("", description="the network namespace, by its path, that leads outside; empty: the host's own")
    pool: str = Field("100.64.0.0/16", description="addresses of microVMs' links and of the veth to the outside; must be free on the host")
    resolvers: list[str] = Field([], description="DNS servers that microVMs' questions go to; empty: the host's")
    subnets: dict[str, list[str]] = Field({}, description="what a connector's SubnetIds mean: subnet-… to networks")
    security_groups: dict[str, list[str]] = Field(
        {}, description="what SecurityGroupIds mean: sg-… to ports, as tcp:443 or udp:53-60, and hosts, as https:api.github.com"
    )

    @field_validator("pool")
    @classmethod
    def _check_pool(cls, pool: str) -> str:
        network = _network(pool)
        if network.num_addresses < _POOL_LEAST:
            raise ValueError(f"{pool} has {network.num_addresses} addresses: {_POOL_LEAST} at least")
        for other in _NO_POOL:
            if network.overlaps(_network(other)):
                raise ValueError(f"{pool} overlaps {other}, which is no network of hosts, or is links' own")
        return pool

    @field_validator("subnets")
    @classmethod
    def _check_subnets(cls, subnets: dict[str, list[str]]) -> dict[str, list[str]]:
        for name, networks in subnets.items():
            for one in networks:
                _network(one, f"{name}: ")
        return subnets

    @field_validator("security_groups")
    @classmethod
    def _check_ports(cls, groups: dict[str, list[str]]) -> dict[str, list[str]]:
        for name, ports in groups.items():
            for one in ports:
                if _HOST_RULE.match(one):
                    *_, last = one.split(":")
                    if last.isdigit() and not 1 <= int(last) <= 65535:
                        raise ValueError(f"{name}: {one} has no port from 1 to 65535")
                    continue
                match = _PORTS.fullmatch(one)
                if match is None or not 0 <= int(match[1]) <= int(match[2] or match[1]) <= 65535:
                    raise ValueError(
                        f"{name}: {one} is not of the form tcp:443 or udp:53-60, nor a host as https:api.example.org, https:*.example.org, "
                        "http:example.org:8080 or tcp:db.example.org:5432"
                    )
        return groups

    @model_validator(mode="after")
    def _check_overlap(self) -> Egress:
        """What lies in the pool is no microVM's to reach."""
        for name, networks in self.subnets.items():
            for one in networks:
                if _network(one).subnet_of(_network(self.pool)):
                    raise ValueError(f"{one} of egress.subnets {name} lies in egress.pool {self.pool}: choose a pool that is free")
        return self


class Traces(_Section):
    endpoint: str = Field("", description="where OpenTelemetry spans go (OTLP over HTTP, …/v1/traces); empty: none are made")


class Logs(_Section):
    endpoint: str = Field("", description="a CloudWatch Logs endpoint to which events are sent too; empty: kept here only")
    retention_days: int = Field(30, ge=0, description="streams silent for longer go; 0: kept until there is no room")
    account_mib: int = Field(8192, ge=128, description="of an account's streams; beyond, those that are silent for longest go")
    account_streams: int = Field(20_000, ge=100, description="of an account; beyond, those that are silent for longest go")


class Records(_Section):
    """What the store keeps of the past."""

    events_days: float = Field(30.0, gt=0, description="transitions and builds stay in the event table for so long, and 100,000 of them")


class Credentials(_Section):
    """Credentials for what runs inside microVMs."""

    sts_endpoint: str = Field("", description="an STS endpoint whose AssumeRole gives them; empty: our own issuer")
    access_key: str = Field("", description="for the STS endpoint")
    secret_key: str = Field("", description="for the STS endpoint")
    secret_key_file: str = Field("", description="its only line is that secret; root's alone to read")


class Archive(_Section):
    """Where sessions go that sleep for long (the object store of `object_store`)."""

    after_seconds: float = Field(0.0, ge=0, description="asleep for longer, a session is moved to the object store; 0: never")
    bucket: str = Field("torpor-archive", description="made where it is not there")
    prefix: str = Field("sessions/", description="before the keys")
    encryption: str = Field(
        "off", pattern="^(off|instance|command)$",
        description="AES-256-GCM; instance: a key of each account is made of ROOT/manifests.key; command: key_command gives it",
    )  # fmt: skip
    key_command: list[str] = Field(
        [],
        description="run by root with an account's number, and the id of a key that it gave; prints an id and 64 hexadecimal digits",
    )

    @model_validator(mode="after")
    def _check_key(self) -> Archive:
        if self.encryption == "command" and not self.key_command:
            raise ValueError("archive.encryption is command: set archive.key_command")
        if self.key_command and not Path(self.key_command[0]).is_absolute():
            raise ValueError(f"archive.key_command begins with {self.key_command[0]}, which is no absolute path: root runs it")
        return self


class Quarantine(_Section):
    """What was set aside because of an error: it goes by age and for room, the oldest first."""

    days: float = Field(14.0, gt=0, description="what was set aside longer ago is removed")
    mib: int = Field(20_480, ge=0, description="where all that is set aside takes more, the oldest of it is removed")


class Sessions(_Section):
    streams_at_suspend: str = Field(
        "park", pattern="^(park|park-all|cut)$",
        description="silent streams on which the client can speak outlive a suspend; park-all: also those of the server alone; cut: none",
    )  # fmt: skip
    stop_seconds: float = Field(
        10.0, ge=0, description="after TerminateMicrovm an application has this long from its STOPSIGNAL (SIGTERM) to its end; 0: no signal"
    )
    parked_streams: int = Field(256, ge=0, description="at most, of one session at one worker; the rest are cut")


class Suspend(_Section):
    drain_seconds: float = Field(5.0, ge=0, description="SuspendMicrovm waits this long for answers under way")
    workers_seconds: float = Field(3.0, ge=0, description="how long edge workers that are reconnecting to control are waited for")
    gate_seconds: float = Field(0.25, gt=0, description="a worker that has not confirmed a closed gate by then is disconnected")


class Standbys(_Section):
    per_image: int = Field(2, ge=0, le=64, description="hypervisors kept waiting for each image in use")
    most_per_image: int = Field(48, ge=0, le=256, description="… where so many were wanted at once lately, memory permitting")
    ahead: int = Field(2, ge=0, le=64, description="microVMs that ran ahead, kept for each image in use whose owner allows it")
    unused_seconds: float = Field(
        900.0, ge=1, description="for so long after its last use an image keeps its hypervisors and its memory, some hundred MiB, in RAM"
    )
    links: int = Field(4, ge=0, le=256, description="network namespaces kept ready")
    warm: int = Field(4, ge=0, le=256, description="suspended sessions whose paused hypervisors are kept, memory permitting")
    warm_seconds: float = Field(300.0, gt=0, description="how long a paused hypervisor is kept")


class Devices(_Section):
    """What each microVM's devices do in a second at most; 0: as much as its control group and the host give."""

    disk_mib_per_second: int = Field(0, ge=0, description="read and written, together")
    disk_operations_per_second: int = Field(0, ge=0, description="reads and writes, together")
    network_mib_per_second: int = Field(0, ge=0, description="in each direction; Firecracker's alone")
    network_packets_per_second: int = Field(0, ge=0, description="in each direction; Firecracker's alone")


class Users(_Section):
    """Numeric user ids without entries in passwd; one range for all."""

    first: int = Field(640_000, ge=1000)
    builders: int = Field(1 << 30, ge=1 << 20, description="first of the ranges of 2^20 ids that accounts' builds get, one each")

    @property
    def edge(self) -> int:
        return self.first

    @property
    def control(self) -> int:
        return self.first + 1

    @property
    def store(self) -> int:
        return self.first + 2

    @property
    def machines(self) -> int:
        return self.first + 2 * 65_536

    @property
    def probe(self) -> int:
        """Of a hypervisor that only shows whether guests run: the last one."""
        return self.first + 3 * 65_536 - 1


class Service(_Section):
    """The service's own processes."""

    memory_mib: int = Field(
        0, ge=0, description="what edges, control and the object store may have of their own, each; 0: half of the host's"
    )
    silent_seconds: float = Field(30.0, ge=1, description="a process whose event loop stands still for so long is replaced")
    stop_seconds: float = Field(
        120.0, ge=30, description="a stop ends within this time; microVMs that are not suspended by then run on without a service"
    )


class Settings(BaseSettings):
    """One instance."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, env_nested_delimiter="__", extra="forbid")

    root: Path = Path("/var/lib/torpor")
    run: Path = Path("/run/torpor")
    cache: Path = Path("/var/cache/torpor")
    name: str = Field("default", pattern=r"^[a-z0-9][a-z0-9-]{0,30}$", description="prefixes namespaces, cgroups, sockets")
    region: str = Field("us-east-1", pattern=r"^[a-z0-9-]+$")
    domain: str = Field("localhost", pattern=r"^[a-z0-9.-]+$")
    account: str = Field("123456789012", pattern=r"^\d{12}$")
    accelerator: str = Field("auto", pattern="^(auto|kvm|tcg)$", description="auto: KVM where a guest that probes it runs")
    probe_seconds: float = Field(40.0, gt=0, description="how long a guest that probes KVM may take")
    hypervisor: str = Field("auto", pattern="^(auto|qemu|firecracker)$", description="auto: Firecracker where it and KVM work")
    oldest_firecracker: str = Field(
        "1.16.2", pattern=r"^\d+\.\d+\.\d+$", description="for tests alone, which let an older release in; those lose what sleeps"
    )
    strangers: str = Field(
        "refuse", pattern="^(refuse|adopt|quarantine)$",
        description="what a start does where store and disks are not of one instance: `torpor serve --adopt`, `--quarantine`",
    )  # fmt: skip
    edge: Edge = Edge()
    api: Api = Api()
    object_store: ObjectStore = ObjectStore()
    images: Images = Images()
    limits: Limits = Limits()
    egress: Egress = Egress()
    logs: Logs = Logs()
    store: Records = Records()
    traces: Traces = Traces()
    credentials: Credentials = Credentials()
    archive: Archive = Archive()
    quarantine: Quarantine = Quarantine()
    sessions: Sessions = Sessions()
    suspend: Suspend = Suspend()
    standbys: Standbys = Standbys()
    devices: Devices = Devices()
    users: Users = Users()
    service: Service = Service()

    @model_validator(mode="after")
    def _archives_are_kept(self) -> Self:
        if self.archive.after_seconds and self.object_store.is_embedded:
            raise ValueError(
                "archive.after_seconds: the embedded object store forgets what it has when it ends, and with it every archived microVM: "
                "set object_store.endpoint to a store that keeps it"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        root = Path(init_settings().get("root") or os.environ.get("TORPOR_ROOT") or cls.model_fields["root"].default)
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, root / "torpor.toml")

    @property
    def runtime(self) -> Path:
        """Sockets, namespaces and hypervisors' directories of this instance."""
        return self.run / self.name

    @property
    def images_dir(self) -> Path:
        return self.root / "images"

    @property
    def sessions_dir(self) -> Path:
        return self.root / "sessions"

    @property
    def control_dir(self) -> Path:
        """Owned by control: the store, keys, logs, artifacts under way."""
        return self.root / "control"

    @property
    def tls_dir(self) -> Path:
        return self.root / "tls"

    @property
    def metrics_token(self) -> Path:
        """Control's copy of what `api.metrics_token_file` says."""
        return self.control_dir / "metrics.token"

    @property
    def aws_dir(self) -> Path:
        """Returns the AWS configuration that points at this instance; a user's own files are never touched."""
        return self.root / "aws"

    @property
    def control_socket(self) -> Path:
        return self.control_runtime / "socket"

    @property
    def control_runtime(self) -> Path:
        """Control's own part of `runtime`, the rest of which only root may change."""
        return self.runtime / "control"

    @property
    def suspend_seconds(self) -> float:
        """Of a stop: for control to suspend what runs. Workers that drain and the end of vmm have the rest."""
        return max(1.0, self.service.stop_seconds - min(self.edge.drain_seconds, self.service.stop_seconds / 4) - END_SECONDS)

    @property
    def vmm_socket(self) -> Path:
        return self.runtime / "vmm.sock"


def _is_unknown(variable: str) -> bool:
    """Whether it is meant for a section that there is not: of such the library says nothing."""
    section, separator, _ = variable.partition("__")
    return bool(separator) and section.startswith(_PREFIX) and section.removeprefix(_PREFIX).lower() not in Settings.model_fields


def _said(error: ErrorDetails) -> str:
    return "there is no such setting" if error["type"] == "extra_forbidden" else error["msg"]


def load(**overrides: Any) -> Settings:
    """Raises ConfigError, which names each wrong setting."""
    if unknown := [name for name in sorted(os.environ) if _is_unknown(name)]:
        raise ConfigError("; ".join(f"{name}: there is no such setting" for name in unknown))
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        lines = [": ".join(filter(None, (".".join(map(str, item["loc"])), _said(item)))) for item in error.errors()]
        raise ConfigError("; ".join(lines)) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"torpor.toml: {error}") from error
