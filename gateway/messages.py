"""What Torpor's processes say to each other (gateway/rpc.py carries it). One struct per request, reply or notification.

Who decodes a request takes nothing that its types do not allow: names that become files' are one plain component, numbers and texts have
bounds. The sender may be a process that was taken over.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

# What control and vmm say to a guest's agent, and what it answers (vmm/guest/port.h). Guests of all lower numbers are understood: an agent
# lies in the memory of its image, and is as old as that.
AGENT_PROTOCOL = 3

# ---- what a field may be ----

# Of names below directories where root works: no separator, no dot at the beginning, which is our own files', and not the mark's name
# (vmm/rpc/identity.py).
_FILE = r"\A(?!instance-id\Z)[A-Za-z0-9]"
SessionId = Annotated[str, Meta(pattern=_FILE + r"[A-Za-z0-9_-]{0,127}\Z")]
ImageKey = Annotated[str, Meta(pattern=_FILE + r"[A-Za-z0-9._-]{0,127}\Z")]
BuildId = Annotated[str, Meta(pattern=_FILE + r"[A-Za-z0-9_-]{0,63}\Z")]
MaybeImageKey = Annotated[str, Meta(pattern=rf"\A(?:{_FILE[2:]}[A-Za-z0-9._-]{{0,127}})?\Z")]
AsideName = Annotated[str, Meta(pattern=_FILE + r"[A-Za-z0-9._-]{0,191}\Z")]  # in the quarantine
AccountId = Annotated[str, Meta(pattern=r"\A[0-9A-Za-z_-]{1,64}\Z")]
InstanceId = Annotated[str, Meta(pattern=r"\A[0-9a-zA-Z-]{1,64}\Z")]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]  # SHA-256
RegistryHost = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9._-]{1,253}(:[0-9]{1,5})?\Z")]
Secret = Annotated[str, Meta(max_length=65536)]
Reason = Annotated[str, Meta(max_length=65536)]
Network = Annotated[str, Meta(pattern=r"\A[0-9./]{1,18}\Z")]
PortRange = Annotated[str, Meta(pattern=r"\A(tcp|udp):[0-9]{1,5}(-[0-9]{1,5})?\Z")]
# https:api.github.com, https:*.example.org, http:example.org:8080, tcp:db.example.org:5432: two labels at least, of which the last is no
# number, so that no address is one (gateway/guest/allow_list.py).
HOST_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
HOST_NAME: Final = rf"(?:{HOST_LABEL}\.)+[a-z](?:[a-z0-9-]{{0,61}}[a-z0-9])?"
_HOST = rf"(?=[^:]{{3,253}}(?::|\Z)){HOST_NAME}"
HOST_PORTS: Final = {"https": 443, "http": 80}  # of rules without one
HOST_RULE: Final = rf"\A(?:https?:(?:\*\.)?{_HOST}(?::[0-9]{{1,5}})?|tcp:{_HOST}:[0-9]{{1,5}})\Z"
HostRule = Annotated[str, Meta(pattern=HOST_RULE)]
Accelerator = Annotated[str, Meta(pattern=r"\A(kvm|tcg)\Z")]
Incarnation = Annotated[int, Meta(ge=0, le=1 << 53)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Mib = Annotated[int, Meta(ge=1, le=1 << 26)]
Processors = Annotated[int, Meta(ge=1, le=4096)]
DiskBytes = Annotated[int, Meta(ge=0, le=1 << 50)]
UserId = Annotated[int, Meta(ge=0, le=(1 << 32) - 2)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Endpoint = Annotated[str, Meta(max_length=512)]
HttpVersion = Annotated[str, Meta(pattern=r"\AHTTP/(1\.1|2)\Z")]
CounterName = Annotated[str, Meta(pattern=r"\A[a-z_]{1,32}\Z")]
WakeFrame = Annotated[bytes, Meta(max_length=4096)]

# ---- control -> vmm ----


class Shape(msgspec.Struct, frozen=True):
    """A machine's size, fixed when its image is made. `accelerator` is kvm or tcg: states do not pass between them.

    `baseline_mib` is the size that was asked for; `memory_mib` and `vcpus` are the peak that the guest sees.
    """

    memory_mib: Mib
    vcpus: Processors
    disk_bytes: DiskBytes
    accelerator: Accelerator
    baseline_mib: Mib


class HostInfo(msgspec.Struct):
    """What this host offers: `memory_cap_mib` and `vcpus_cap` bound a guest's peak."""

    accelerator: str
    accelerator_note: str
    hypervisor: str
    memory_cap_mib: int
    vcpus_cap: int
    architecture: str


class Capacity(msgspec.Struct):
    """What the host has free for admission, in bytes, and how much one more microVM is expected to take. `disk_owed`: what the disks of
    all microVMs are to have beside (limits.disk_percent). Descriptors are those of vmm."""

    memory_available: int
    disk_free: int
    inodes_free: int
    expected_growth: int
    descriptors_free: int = 1 << 30
    disk_owed: int = 0


class EgressRules(msgspec.Struct, frozen=True):
    """What a microVM may reach: the internet over TCP, or only `networks` at `ports` (tcp:443, udp:53-60; none: all TCP, unless there are
    hosts), and `hosts` by their names."""

    internet: bool = True
    networks: Annotated[list[Network], Meta(max_length=1024)] = []
    ports: Annotated[list[PortRange], Meta(max_length=1024)] = []
    hosts: Annotated[list[HostRule], Meta(max_length=1024)] = []


class BuildRequest(msgspec.Struct):
    """Builds the container image and the disk of `image`. Two descriptors come along, of a tar archive and of the Dockerfile, both plain
    files that the sender may read: vmm opens no path of another process's.

    `account`: whose layer store and cache mounts are used. `users`: ids beyond vmm's range that the image's files may belong to.
    `logins`: registry hosts to base64 of `user:password`; they are reached even where their addresses are private. `modules`: whether the
    disk gets the kernel's modules, which then load on demand.
    """

    build: BuildId
    image: ImageKey
    account: AccountId
    users: Annotated[list[UserId], Meta(max_length=65536)]
    disk_bytes: DiskBytes
    logins: Annotated[dict[RegistryHost, Secret], Meta(max_length=256)]
    modules: bool = False


class BuildResult(msgspec.Struct):
    """`status` 0 is success; `config` is the container image's configuration (OCI image-spec, config.md) as JSON. `reason`: why what was
    built is not taken. `room_bytes`: what the build could add to its account's layers; 0: no bound."""

    status: int
    config: str
    disk_full: bool
    out_of_memory: bool
    reason: str = ""
    room_bytes: int = 0


class BootRequest(msgspec.Struct):
    """Boots the machine of an image that is being made; it is called by `session` until it is sealed."""

    session: SessionId
    image: ImageKey
    shape: Shape
    egress: EgressRules | None = None


class BootedRequest(msgspec.Struct):
    """Names the machine that boots for an image."""

    session: SessionId
    image: ImageKey


class SealRequest(msgspec.Struct):
    """`account`: whose image it becomes."""

    session: SessionId
    image: ImageKey
    account: AccountId


class Sealed(msgspec.Struct):
    """`generators`: how many of OpenSSL's had been seeded, and seed themselves anew in each clone (vmm/generators.py)."""

    memory_bytes: int
    disk_bytes: int
    code_bytes: int
    generators: int = 0


class ImageName(msgspec.Struct):
    image: ImageKey


class PrepareRequest(msgspec.Struct):
    """Brings a session's state into a hypervisor, short of running: from its snapshot, or for a launch the image's."""

    session: SessionId
    incarnation: Incarnation
    image: ImageKey
    from_snapshot: bool
    egress: EgressRules | None = None


class ClaimRequest(msgspec.Struct):
    """Makes a prepared session another one: a microVM that ran ahead becomes the session it was made for."""

    ahead: SessionId
    session: SessionId
    incarnation: Incarnation
    egress: EgressRules | None = None


class StartRequest(msgspec.Struct):
    """Runs what was prepared. `wake` is a frame for the agent; its first field takes the wall clock."""

    session: SessionId
    incarnation: Incarnation
    wake: WakeFrame


class SessionRef(msgspec.Struct):
    session: SessionId
    incarnation: Incarnation


class ReleaseVmRequest(msgspec.Struct):
    """A session is SUSPENDED, its snapshot durable: its hypervisor ends, or stays paused where `keep_warm` and the host allow it.
    `parked`: edges hold connections into its network, which stays then."""

    session: SessionId
    incarnation: Incarnation
    keep_warm: bool
    parked: bool = False


class PackRequest(msgspec.Struct):
    """Writes a sleeping session's files, compressed, to the descriptor that comes along."""

    session: SessionId
    incarnation: Incarnation


class Packed(msgspec.Struct):
    size: int
    digest: str  # SHA-256


class UnpackRequest(msgspec.Struct):
    """Puts a session's files back from the descriptor that comes along, where its SHA-256 is this."""

    session: SessionId
    digest: Digest


class QuarantineRequest(msgspec.Struct):
    """Sets a session's files aside: `reason` says why, to whoever looks at them. `incarnation` and `image` are what control knows."""

    session: SessionId
    incarnation: Incarnation
    image: MaybeImageKey
    reason: Reason


class QuarantineName(msgspec.Struct):
    session: AsideName


class Quarantined(msgspec.Struct):
    """A session whose files were set aside, `at` in seconds since the epoch, and the bytes that they take on the disk. `snapshot`: the
    incarnation whose snapshot is among them, 0 where there is none. `is_disk_as_saved`: nothing was written to the disk since."""

    session: str
    incarnation: int
    image: str
    reason: str
    at: float
    bytes: int = 0
    snapshot: int = 0
    is_disk_as_saved: bool = False


class Marks(msgspec.Struct):
    """The instance ids that images/ and sessions/ have; empty where they have none."""

    images: str
    sessions: str


class MarkRequest(msgspec.Struct):
    instance: InstanceId


class ImageQuarantineRequest(msgspec.Struct):
    """Sets an image's files aside."""

    image: ImageKey
    reason: Reason


class Suspended(msgspec.Struct):
    """A durable snapshot: bytes of changed memory, device state, and of the overlay as it lies on the disk."""

    memory_bytes: int
    state_bytes: int
    disk_bytes: int
    seconds: float


class SessionState(msgspec.Struct):
    """One hypervisor that holds a session. `phase`: prepared, starting, running, saving (its guest stops soon, or has), stopped, warm."""

    session: str
    incarnation: int
    phase: str
    memory_bytes: int
    cpu_seconds: float


class Effort(msgspec.Struct):
    """What a running guest has used since it began: processor time; time in which it could have run and waited for the host's processors;
    bytes read from the host's disks."""

    cpu_seconds: float
    waited_seconds: float
    read_bytes: int


class HostState(msgspec.Struct):
    """Everything vmm holds: live sessions, those that are being prepared, sessions with a usable snapshot, images, builds under way."""

    sessions: list[SessionState]
    snapshots: dict[str, int]
    images: list[str]
    builds: list[str]
    preparing: list[str] = []


class Ended(msgspec.Struct):
    """vmm -> control: a session's hypervisor ended by itself. `has_run`: its guest had been told to run."""

    session: SessionId
    incarnation: Incarnation
    reason: Reason
    has_run: bool = True


class Step(msgspec.Struct):
    """One step of a launch, resume or suspend: which process took it, what it was, milliseconds."""

    where: str
    what: str
    took_ms: float


class Trace(msgspec.Struct):
    """The last work on a session: launch, resume or suspend, when it began, and its steps."""

    work: str
    started_at: float
    steps: list[Step]


class LogRequest(msgspec.Struct):
    """Root asks for the lines of a microVM's log that are kept in memory, from number `after` on."""

    session: str
    after: int = 0


class EgressLogRequest(msgspec.Struct):
    """Root asks for lines of a microVM's egress audit, behind the one of this order."""

    session: str
    after: int = 0


class LogLine(msgspec.Struct):
    """`t` in milliseconds since the epoch."""

    number: int
    t: int
    text: str


class MicrovmLog(msgspec.Struct):
    """Where the microVM's log stream is; `why` it has none, empty where it has one; our own lines that are in no stream."""

    group: str
    stream: str
    why: str
    lines: list[LogLine]


class BuildName(msgspec.Struct):
    build: BuildId


class ServicesRequest(msgspec.Struct):
    """Asks for the sockets on which the guest asks: metadata (TCP), names (UDP, TCP), and with `is_named` the one to which its connections
    to hosts come that are allowed by name (TCP)."""

    session: SessionId
    incarnation: Incarnation
    is_named: bool = False


# ---- edge -> vmm ----


class SocketsRequest(msgspec.Struct):
    """Asks for `count` unconnected TCP sockets inside the session's namespace."""

    session: SessionId
    incarnation: Incarnation
    count: Annotated[int, Meta(ge=1, le=1024)]


# ---- control <-> edge ----


class Route(msgspec.Struct, frozen=True):
    """Where an endpoint's requests go. `gate`: open, hold (resume or wait), refuse (502). `is_live`: the incarnation's
    hypervisor is there; when it is not, nothing may stay connected to it. A route without session removes the endpoint's."""

    endpoint: str
    session: str
    incarnation: int
    gate: str
    is_live: bool = True
    baseline_mib: int = 0  # the size that was asked for, which bounds connections and rates where a profile does
    opens_http: bool = True  # by its ingress connectors
    opens_shell: bool = True
    account: str = ""  # whose session it is: what is held is shared between accounts


class Verifier(msgspec.Struct):
    """A key set entry: the JWE key and the public half of the signing key; the edge never has the private half."""

    kid: str
    encryption_key: bytes
    public_key: bytes


class Revoked(msgspec.Struct):
    """Tokens that count no more: those minted before `before`, and of a session before its moment, in seconds since the epoch; and, since a
    clock may be wrong when a token is minted, those with a number below `below`, and of a session below its number. `number` is that of
    the newest revocation, which tokens have that are minted from then on."""

    before: float = 0.0
    sessions: dict[str, float] = {}
    number: int = 0
    below: int = 0
    numbers: dict[str, int] = {}

    def moment(self, session: str) -> float:
        return max(self.before, self.sessions.get(session, 0.0))


class KeySet(msgspec.Struct):
    """control -> edge: what tokens are verified with from now on."""

    keys: list[Verifier]
    revoked: Revoked


class Hello(msgspec.Struct):
    """edge -> control, first thing: the name of the worker's slot, which its successor has too."""

    worker: Annotated[str, Meta(pattern=r"\A[a-z0-9-]{1,32}\Z")]


class Table(msgspec.Struct):
    """control -> edge, the answer to Hello: all routes, and the keys. Changes of it follow on the same connection, in order."""

    routes: list[Route]
    keys: list[Verifier]
    revoked: Revoked | None = None


class GateAnswer(msgspec.Struct):
    """edge -> control: a session's activity at the instant its gate was closed. `count` grows with every activity; `waiting` requests
    still wait for the head of their final response. `is_closed` says what the worker's table holds now."""

    count: int
    waiting: int
    is_closed: bool


class DrainRequest(msgspec.Struct):
    """control -> edge, when the session's gate is closed: wait up to `seconds` until no request waits for its response's head and,
    where streams are to be parked, none is under way. Then, with `cut`, park up to `park` streams and cut the other connections.
    Streams on which only the server speaks are parked with `one_way` alone: no client can wake the session on them.

    `if_quiet`: nothing is parked or cut where something passed since the gate closed, or where a stream cannot be parked.
    """

    session: str
    incarnation: int
    seconds: float
    cut: bool
    park: int = 0
    if_quiet: bool = False
    one_way: bool = False


class Drained(msgspec.Struct):
    """edge -> control: how many streams are parked; whether a client spoke on one since the gate closed, so that the application
    may owe it an answer; and whether the request's condition was met: the gate is closed, and with `if_quiet` nothing passed since."""

    parked: int = 0
    spoken: bool = False
    quiet: bool = True


class Activity(msgspec.Struct):
    """edge -> control, in batches: session to (count, seconds since its last activity, waiting requests)."""

    sessions: dict[SessionId, tuple[Count, float, Count]]


class Listened(msgspec.Struct):
    """edge -> control -> the other workers, in batches: session, incarnation and port of applications that have been connected to."""

    ports: list[tuple[SessionId, Incarnation, Port]]


# Ends a line about an application that refuses connections: control adds what does listen, which it asks the guest.
NOTHING_LISTENS = "nothing listens"


class Faults(msgspec.Struct):
    """edge -> control: what was wrong with applications; by session, lines for the microVM's log."""

    lines: Annotated[dict[SessionId, list[str]], Meta(max_length=2048)]


class Counters(msgspec.Struct):
    """edge -> control: what a worker counted since it started, for the metrics. `answers`: by protocol, then by the status's
    first digit."""

    answers: dict[HttpVersion, Annotated[list[Count], Meta(max_length=10)]]
    clients: Count
    held: Count
    origins: Annotated[dict[CounterName, Count], Meta(max_length=64)]
    parked: Count = 0
    lost_lines: Count = 0  # of the access log, which could not be written
    not_reopened: Count = 0  # how often the access log's file could not be opened again after a rotation


class ShellRequest(msgspec.Struct):
    """edge -> control: opens a shell in a running session for whoever sent `token`; the answer is one end of a socket pair
    (SOCK_SEQPACKET), on which a message is a byte of kind and its payload."""

    session: SessionId
    incarnation: Incarnation
    columns: Annotated[int, Meta(ge=0, le=65535)]
    rows: Annotated[int, Meta(ge=0, le=65535)]
    token: Secret


SHELL_INPUT: Final = b"i"  # edge -> control: what was typed
SHELL_RESIZE: Final = b"r"  # edge -> control: u16 columns and rows
SHELL_OUTPUT: Final = b"o"  # control -> edge
SHELL_EXIT: Final = b"x"  # control -> edge: i32 exit code
SHELL_MESSAGE_BYTES: Final = 65536


class StoreKeyRequest(msgspec.Struct):
    """Of the embedded object store: who a request's key is, what its signature is checked with, and whether it may do this."""

    key: Annotated[str, Meta(max_length=128)]
    token: Annotated[str, Meta(max_length=8192)]
    day: Annotated[str, Meta(pattern=r"\A[0-9]{8}\Z")]
    region: Annotated[str, Meta(pattern=r"\A[a-z0-9-]{1,64}\Z")]
    action: Annotated[str, Meta(pattern=r"\As3:[A-Za-z]{1,64}\Z")]
    resource: Annotated[str, Meta(max_length=4096)]


class StoreKey(msgspec.Struct):
    """`signing` signs for S3 on that day and in that region, and for nothing else."""

    account: str
    signing: bytes
    is_allowed: bool


class RevokeRequest(msgspec.Struct):
    """Of the host's root. `before` 0: now."""

    session: Annotated[str, Meta(max_length=128)]
    before: float = 0.0


class LookupRequest(msgspec.Struct):
    endpoint: Endpoint


class ResumeRequest(msgspec.Struct):
    """edge -> control: a request is held for this session, whose incarnation it last knew."""

    session: SessionId
    incarnation: Incarnation


# ---- control <-> relay (gateway/guest/relay.py) ----


Walls = Annotated[list[Annotated[str, Meta(max_length=16)]], Meta(max_length=4)]  # that a kernel does not have


class RelaySession(msgspec.Struct):
    session: SessionId


class RelayListen(msgspec.Struct):
    """Connections of a guest come to the socket that comes along. At `ports` the client's own words say which host it wants; at `blind`
    there may be none, and its address is asked about first."""

    session: SessionId
    ports: list[Port]
    blind: list[Port]


class RelayQuestion(msgspec.Struct):
    """A guest wants `address`, and says `name` in the words of `scheme` (https, http; tcp: it says nothing). `fault`: why it is refused
    whatever name it says."""

    session: SessionId
    scheme: Annotated[str, Meta(pattern=r"\A(https|http|tcp)\Z")]
    name: Annotated[str, Meta(max_length=253)]
    address: Annotated[str, Meta(max_length=15)]
    port: Port
    fault: Annotated[str, Meta(max_length=200)] = ""


class RelayVerdict(msgspec.Struct):
    """Allowed where a `connection` has a number; a connected socket comes along then. `is_undecided`: what the client says decides."""

    connection: Count = 0
    is_undecided: bool = False


class RelayEnd(msgspec.Struct):
    """`sent` and `received` are the guest's bytes."""

    connection: Count
    sent: Count
    received: Count


# ---- root -> control: accounts (gateway/accounts/admin.py) ----


class AccountName(msgspec.Struct):
    """`account` is twelve digits; empty where one is to be made up."""

    name: str
    account: str


class AccountFacts(msgspec.Struct):
    account: str
    name: str
    created_at: float


class Tier(msgspec.Struct):
    """Where a sleeping session is: warm (paused, its memory), cold (files), archived (object store); and what it takes there."""

    tier: str
    stored_bytes: int


class SessionName(msgspec.Struct):
    session: str


class KeyName(msgspec.Struct):
    key: str


class KeyRequest(msgspec.Struct):
    """`policy` is IAM's JSON; empty: nothing is allowed."""

    account: str
    user: str
    policy: str


class KeyFacts(msgspec.Struct):
    """`secret` is said once, to whoever made the key."""

    key: str
    secret: str
    account: str
    user: str
    policy: str
    created_at: float


class RoleFacts(msgspec.Struct):
    arn: str
    policy: str


class QuotaUse(msgspec.Struct):
    account: str
    what: str
    used: int
    limit: int
