#!/usr/bin/python3
"""Firecracker's contract without KVM: its API (src/firecracker/swagger/firecracker.yaml, src/vmm/src/rpc_interface.rs), its snapshot
files and its vsock (docs/snapshotting, docs/vsock.md), refusing what the real one refuses; the guest behind it is a stand-in that
keeps its state in its memory, page by page, so that what a driver saves and loads can be told apart from what it lost.

It is as unkind as the worst release was: of a guest that boots the first connections wait for ever, and those that are made before a guest
has handled the reset of its vsock are lost in each way that was seen.
"""

import contextlib
import ctypes
import fcntl
import http.server
import json
import mmap
import os
import re
import socket
import socketserver
import struct
import sys
import threading
import zlib
from typing import Any

PAGE = 4096
VERSION = "1.16.2"  # tests make copies that are of another release
RELEASE = tuple(int(part) for part in VERSION.split(".")[:2])
# The version of a snapshot's format, by the first release that has it (src/vmm/src/persist.rs).
FORMATS = {(1, 12): 6, (1, 13): 8, (1, 15): 9, (1, 16): 10}
FORMAT = next(number for release, number in sorted(FORMATS.items(), reverse=True) if release <= RELEASE)

# ---- facts: paths, methods, members (required ones first), and when a call is allowed ----

STRING, NUMBER, FLAG, LIST, OBJECT = str, int, bool, list, dict
DEFINITIONS: dict[str, tuple[dict[str, type], dict[str, type]]] = {
    "MachineConfiguration": (
        {"mem_size_mib": NUMBER, "vcpu_count": NUMBER},
        {"smt": FLAG, "track_dirty_pages": FLAG, "cpu_template": STRING, "huge_pages": STRING},
    ),
    "CpuTemplate": ({}, {"kvm_capabilities": LIST, "cpuid_modifiers": LIST, "msr_modifiers": LIST, "reg_modifiers": LIST, "vcpu_features": LIST}),
    "BootSource": ({"kernel_image_path": STRING}, {"boot_args": STRING, "initrd_path": STRING}),
    "Drive": (
        {"drive_id": STRING, "is_root_device": FLAG},
        {"partuuid": STRING, "cache_type": STRING, "is_read_only": FLAG, "path_on_host": STRING, "rate_limiter": OBJECT, "io_engine": STRING, "socket": STRING},
    ),
    "NetworkInterface": (
        {"host_dev_name": STRING, "iface_id": STRING},
        {"guest_mac": STRING, "mtu": NUMBER, "rx_rate_limiter": OBJECT, "tx_rate_limiter": OBJECT},
    ),
    "Vsock": ({"guest_cid": NUMBER, "uds_path": STRING}, {"vsock_id": STRING}),
    "InstanceActionInfo": ({"action_type": STRING}, {}),
    "Vm": ({"state": STRING}, {}),
    "SnapshotCreateParams": ({"mem_file_path": STRING, "snapshot_path": STRING}, {"snapshot_type": STRING}),
    "SnapshotLoadParams": (
        {"snapshot_path": STRING},
        {
            "enable_diff_snapshots": FLAG, "track_dirty_pages": FLAG, "mem_file_path": STRING, "mem_backend": OBJECT, "resume_vm": FLAG,
            "network_overrides": LIST, "vsock_override": OBJECT, "clock_realtime": FLAG, "huge_pages": STRING,
        },
    ),
    "MemoryBackend": ({"backend_type": STRING, "backend_path": STRING}, {}),
    "NetworkOverride": ({"iface_id": STRING, "host_dev_name": STRING}, {}),
    "EntropyDevice": ({}, {"rate_limiter": OBJECT}),
    "Metrics": ({"metrics_path": STRING}, {}),
    "PartialDrive": ({"drive_id": STRING}, {"path_on_host": STRING, "rate_limiter": OBJECT}),
    "PartialNetworkInterface": ({"iface_id": STRING}, {"rx_rate_limiter": OBJECT, "tx_rate_limiter": OBJECT}),
    "RateLimiter": ({}, {"bandwidth": OBJECT, "ops": OBJECT}),
    "Logger": ({}, {"level": STRING, "log_path": STRING, "show_level": FLAG, "show_log_origin": FLAG, "module": STRING}),
}  # fmt: skip
SINCE = {"track_dirty_pages": (1, 13), "vsock_override": (1, 16), "clock_realtime": (1, 16), "huge_pages": (1, 17)}
LOAD = DEFINITIONS["SnapshotLoadParams"][1]
for member, release in SINCE.items():
    if release > RELEASE:
        del LOAD[member]
PRE_BOOT, POST_BOOT = "before", "after"
CALLS: dict[tuple[str, str], tuple[str, str]] = {
    ("PUT", "/machine-config"): ("MachineConfiguration", PRE_BOOT),
    ("PUT", "/cpu-config"): ("CpuTemplate", PRE_BOOT),
    ("PUT", "/boot-source"): ("BootSource", PRE_BOOT),
    ("PUT", "/drives/{id}"): ("Drive", PRE_BOOT),
    ("PUT", "/network-interfaces/{id}"): ("NetworkInterface", PRE_BOOT),
    ("PUT", "/vsock"): ("Vsock", PRE_BOOT),
    ("PUT", "/logger"): ("Logger", PRE_BOOT),
    ("PUT", "/entropy"): ("EntropyDevice", PRE_BOOT),
    ("PUT", "/metrics"): ("Metrics", PRE_BOOT),
    ("PUT", "/snapshot/load"): ("SnapshotLoadParams", PRE_BOOT),
    ("PUT", "/actions"): ("InstanceActionInfo", ""),
    ("PUT", "/snapshot/create"): ("SnapshotCreateParams", POST_BOOT),
    ("PATCH", "/vm"): ("Vm", POST_BOOT),
    ("PATCH", "/drives/{id}"): ("PartialDrive", POST_BOOT),
    ("PATCH", "/network-interfaces/{id}"): ("PartialNetworkInterface", POST_BOOT),
}
ENUMS = {
    "state": ("Paused", "Resumed"), "snapshot_type": ("Full", "Diff"), "backend_type": ("File", "Uffd"), "cache_type": ("Unsafe", "Writeback"),
    "io_engine": ("Sync", "Async"), "action_type": ("FlushMetrics", "InstanceStart", "SendCtrlAltDel"), "huge_pages": ("None", "Transparent", "2M", "Snapshot"),
}  # fmt: skip


SHOWN = {str: "string", int: "integer", bool: "boolean", list: "sequence", dict: "map", float: "floating point"}


class Refused(Exception):
    """400, with the words of the real one."""


class NoKernel(Refused):
    """The guest's kernel is none; without an API the real one shows where in its own types that was noticed."""


def checked(name: str, body: Any) -> dict[str, Any]:
    """serde, with deny_unknown_fields: members, types, enumerations."""
    required, optional = DEFINITIONS[name]
    if not isinstance(body, dict):
        raise Refused("An error occurred when deserializing the json body of a request: invalid type.")
    for member in required:
        if member not in body:
            raise Refused(f"An error occurred when deserializing the json body of a request: missing field `{member}`.")
    for member, value in body.items():
        kind = required.get(member) or optional.get(member)
        if kind is None:
            raise Refused(f"An error occurred when deserializing the json body of a request: unknown field `{member}`.")
        if not isinstance(value, kind) or (kind is NUMBER and isinstance(value, bool)):
            raise Refused(
                f"An error occurred when deserializing the json body of a request: invalid type: {SHOWN[type(value)]} {json.dumps(value)}."
            )
        if member.endswith("rate_limiter"):
            for bucket in checked("RateLimiter", value).values():
                if missing := [name for name in ("size", "refill_time") if name not in bucket]:
                    raise Refused(f"An error occurred when deserializing the json body of a request: missing field `{missing[0]}`.")
        if member in ENUMS and value not in ENUMS[member]:
            raise Refused(f"An error occurred when deserializing the json body of a request: unknown variant `{value}`.")
    return body


# ---- the guest: an agent whose application state lies in page STATE_PAGE, and which dirties pages as it goes ----

MAGIC, HEAD = 0x52505254, struct.Struct("<IBBHI")
HELLO, WAKE, CONFIG, START, IS_HELLO, WOKEN, EXIT = 0x01, 0x02, 0x03, 0x04, 0x81, 0x82, 0x84
STATE_PAGE, FIRST_SCRATCH = 300, 1000
STATE = struct.Struct("<IiiQ")
AGENT_PORT, PROTOCOL = 1024, 3
# What becomes of connections, one after the other: while a guest boots, and until it has handled the reset of its device. After BROKEN and
# MUTE the host has its "OK". What is said on a MUTE one is carried out, and its answer lost.
SILENT, CLOSED, BROKEN, MUTE = "silent", "closed", "broken", "mute"
BOOTING, RESETTING = [SILENT, CLOSED], [BROKEN, MUTE, SILENT]


class Guest:
    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.dirty: set[int] = set()
        self.running = threading.Event()
        self.connections: list[socket.socket] = []
        self.received = self.sent = 0  # by its vsock
        self.losses: list[str] = []  # of the next connections

    def write(self, page: int, data: bytes) -> None:
        self.memory[page * PAGE : page * PAGE + len(data)] = data
        self.dirty.add(page)

    def state(self) -> tuple[int, int, int, int]:
        """The application's state, its exit code, how often the guest was woken, and the last one's nonce."""
        return STATE.unpack_from(self.memory, STATE_PAGE * PAGE)

    def boot(self) -> None:
        self.write(STATE_PAGE, STATE.pack(0, 0, 0, 0))
        for page in range(16, 200):  # a kernel and its data
            self.write(page, struct.pack("<Q", page) * (PAGE // 8))

    def check(self) -> bool:
        """Whether every page that was ever written says what it must: none lost, none from another time."""
        woken = self.state()[2]
        booted = all(self.memory[page * PAGE : page * PAGE + 8] == struct.pack("<Q", page) for page in range(16, 200))
        marks = [struct.unpack_from("<Q", self.memory, (FIRST_SCRATCH + 3 * turn) * PAGE)[0] for turn in range(1, 40)]
        return booted and marks == [turn if turn <= woken else 0 for turn in range(1, 40)]

    def serve(self, sock: socket.socket, is_mute: bool = False) -> None:
        pending = b""
        while data := sock.recv(65536):
            self.running.wait()
            pending += data
            self.received += len(data)
            while len(pending) >= HEAD.size:
                magic, kind, _, _, length = HEAD.unpack_from(pending)
                if magic != MAGIC:
                    pending = pending[1:]
                    continue
                if len(pending) < HEAD.size + length:
                    break
                payload, pending = pending[HEAD.size : HEAD.size + length], pending[HEAD.size + length :]
                for kind_out, out in self.answer(kind, payload):
                    if not is_mute:
                        self.sent += HEAD.size + len(out)
                        sock.sendall(HEAD.pack(MAGIC, kind_out, 0, 0, len(out)) + out)

    def answer(self, kind: int, payload: bytes) -> list[tuple[int, bytes]]:
        state, code, woken, last = self.state()
        if kind == HELLO:
            # A guest whose memory is not what it must be has an application that is in no state there is.
            return [(IS_HELLO, payload[:8] + struct.pack("<IiI", state if self.check() else 99, code, PROTOCOL))]
        if kind == WAKE:
            (nonce,) = struct.unpack_from("<Q", payload, 8)
            if nonce != last:
                self.write(STATE_PAGE, STATE.pack(state, code, woken + 1, nonce))
                self.write(FIRST_SCRATCH + 3 * (woken + 1), struct.pack("<Q", woken + 1))
            return [(WOKEN, payload[8:16])]
        if kind == START and state == 0:  # nothing was configured: the application ends at once, as a shell says it
            self.write(STATE_PAGE, STATE.pack(2, 127, woken, last))
            return [(EXIT, struct.pack("<i", 127))]
        return []


# ---- the process ----


class Vm:
    def __init__(self, identifier: str) -> None:
        self.id = identifier
        self.state = "Not started"
        self.configured: dict[str, Any] = {}
        self.guest: Guest | None = None
        self.tracks = False
        self.tap: int | None = None
        self.metrics: int | None = None
        self.entropy_bytes = 0  # that the guest took since the last line

    def call(self, method: str, path: str, body: Any) -> Any:
        kind = re.sub(r"^/(drives|network-interfaces)/[A-Za-z0-9_]+$", r"/\1/{id}", path)
        if method == "GET" and path == "/":
            return {"app_name": "Firecracker", "id": self.id, "state": self.state, "vmm_version": VERSION}
        if method == "GET" and path == "/vm/config":
            return self.configuration()
        if (method, kind) not in CALLS:
            raise Refused(f"Invalid request method and/or path: {method} {path}.")
        name, when = CALLS[method, kind]
        body = checked(name, body)
        if kind.endswith("{id}") and body["drive_id" if "Drive" in name else "iface_id"] != path.rpartition("/")[2]:
            raise Refused("The id from the path does not match the id from the body!")
        if when == PRE_BOOT and self.state != "Not started":
            raise Refused("The requested operation is not supported after starting the microVM.")
        if when == POST_BOOT and self.state == "Not started":
            raise Refused("The requested operation is not supported before starting the microVM.")
        return getattr(self, "do_" + name)(kind, body)

    def start(self, path: str) -> None:
        """Without an API: all from one file. Its console is standard output, as `--no-api` has it."""
        with open(path, encoding="utf-8") as file:
            configuration = json.load(file)
        for name in ("machine-config", "boot-source"):
            self.call("PUT", f"/{name}", configuration.pop(name))
        if configuration != {"drives": []}:
            raise Refused(f"unknown field or drives: {configuration}")
        line = self.configured["/boot-source"]["boot_args"]
        self.call("PUT", "/actions", {"action_type": "InstanceStart"})
        print("init 0.042: a guest's init runs" if line.endswith("-- probe") else "init 5.042: find /dev/vda: No such file", flush=True)

    def do_MachineConfiguration(self, kind: str, body: dict[str, Any]) -> None:
        if not (body["vcpu_count"] == 1 or body["vcpu_count"] % 2 == 0) or not 1 <= body["vcpu_count"] <= 32 or body["mem_size_mib"] < 1:
            raise Refused("Machine config error: The vCPU number is invalid!")
        self.configured[kind] = body

    def do_CpuTemplate(self, kind: str, body: dict[str, Any]) -> None:
        for leaf in body.get("cpuid_modifiers", []):
            if set(leaf) != {"leaf", "subleaf", "flags", "modifiers"} or not leaf["leaf"].startswith("0x"):
                raise Refused("An error occurred when deserializing the json body of a request: CpuidLeafModifier.")
            for one in leaf["modifiers"]:
                if one["register"] not in ("eax", "ebx", "ecx", "edx") or not re.fullmatch(r"0b[01x_]{1,39}", one["bitmap"]):
                    raise Refused("An error occurred when deserializing the json body of a request: CpuidRegisterModifier.")

    def do_BootSource(self, kind: str, body: dict[str, Any]) -> None:
        for member, words in (
            ("kernel_image_path", "kernel file cannot be opened:"),
            ("initrd_path", "initrd file cannot be opened due to"),
        ):
            try:
                open(body.get(member, "/dev/null"), "rb").close()
            except OSError as error:
                raise Refused(f"Boot source error: The {words} {error.strerror} (os error {error.errno})") from error
        self.configured[kind] = body

    def do_Drive(self, kind: str, body: dict[str, Any]) -> None:
        if "path_on_host" not in body or "is_read_only" not in body:
            raise Refused("Drive config error: missing field")
        open_disk(body)
        self.configured[kind] = body

    def do_NetworkInterface(self, kind: str, body: dict[str, Any]) -> None:
        self.open_tap(body["host_dev_name"])
        self.configured[kind] = body

    def do_Vsock(self, kind: str, body: dict[str, Any]) -> None:
        if body["guest_cid"] < 3:
            raise Refused("Vsock config error: cid")
        self.configured[kind] = body

    def configuration(self) -> dict[str, Any]:
        """What of a device is not limited has no limiter here, as none that was given buckets without tokens."""
        shown: dict[str, Any] = {"entropy": None, "mmds-config": None, "drives": [], "network-interfaces": []}
        for kind, body in self.configured.items():
            one = {name: value for name, value in body.items() if not name.endswith("rate_limiter")}
            for name in ("rate_limiter", "rx_rate_limiter", "tx_rate_limiter"):
                buckets = {bucket: values for bucket, values in (body.get(name) or {}).items() if values["size"] and values["refill_time"]}
                if buckets:
                    one[name] = {
                        bucket: {"one_time_burst": None, **buckets[bucket]} if bucket in buckets else None
                        for bucket in ("bandwidth", "ops")
                    }
            group = kind.removeprefix("/").removesuffix("/{id}")
            if isinstance(shown.get(group), list):
                shown[group].append(one)
            else:
                shown[group] = one
        return shown

    def do_EntropyDevice(self, kind: str, body: dict[str, Any]) -> None:
        self.configured[kind] = body

    def do_Metrics(self, kind: str, body: dict[str, Any]) -> None:
        """No part of the machine: no snapshot has it, and it is no hindrance to a load."""
        if self.metrics is not None:
            raise Refused(
                "Metrics error: Cannot initialize the metrics system due to bad user input: Reinitialization of metrics not allowed."
            )
        flags = os.O_RDWR | os.O_NONBLOCK | (os.O_CREAT if RELEASE >= (1, 14) else 0)
        try:
            self.metrics = os.open(body["metrics_path"], flags, 0o600)
        except OSError as error:
            raise Refused(
                f"Metrics error: Cannot initialize the metrics system due to bad user input: {error.strerror} (os error {error.errno})"
            ) from error

    def flush(self) -> None:
        """A line of what was counted since the one before."""
        if self.metrics is None:
            return
        guest = self.guest
        assert guest is not None
        channel = {"rx_bytes_count": guest.received, "tx_bytes_count": guest.sent}
        line = {"utc_timestamp_ms": 0, "entropy": {"entropy_bytes": self.entropy_bytes}, "vsock": channel, "mmds": {"rx_accepted": 0}}
        os.write(self.metrics, json.dumps(line).encode() + b"\n")
        self.entropy_bytes = guest.received = guest.sent = 0

    def do_PartialDrive(self, kind: str, body: dict[str, Any]) -> None:
        self.update(kind, "drive_id", body)

    def do_PartialNetworkInterface(self, kind: str, body: dict[str, Any]) -> None:
        self.update(kind, "iface_id", body)

    def update(self, kind: str, member: str, body: dict[str, Any]) -> None:
        """Of a limiter a bucket that is left out stays as it was."""
        known = self.configured.get(kind)
        if known is None or known[member] != body[member]:
            raise Refused("unknown device")
        for name, buckets in body.items():
            known[name] = {**known.get(name, {}), **buckets} if name.endswith("rate_limiter") else buckets

    def do_Logger(self, kind: str, body: dict[str, Any]) -> None:
        pass

    def do_InstanceActionInfo(self, _: str, body: dict[str, Any]) -> None:
        if body["action_type"] == "FlushMetrics":
            if self.state == "Not started":
                raise Refused("The requested operation is not supported before starting the microVM.")
            self.flush()
            return
        if body["action_type"] != "InstanceStart":
            raise Refused("not here")
        if self.state != "Not started":
            raise Refused("The requested operation is not supported after starting the microVM.")
        if "/boot-source" not in self.configured:
            raise Refused("Start microvm error: Cannot start microvm without kernel configuration.")
        with open(self.configured["/boot-source"]["kernel_image_path"], "rb") as kernel:
            if kernel.read(4) != b"\x7fELF":
                raise NoKernel(
                    "Start microvm error: System configuration error: Cannot load kernel due to invalid memory configuration or invalid kernel "
                    "image: Kernel Loader: failed to load ELF kernel image"
                )
        size = self.configured.get("/machine-config", {"mem_size_mib": 128})["mem_size_mib"] << 20
        self.guest = Guest(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.guest.boot()
        self.entropy_bytes += 64 if "/entropy" in self.configured else 0  # its kernel's first question
        self.guest.losses = [*BOOTING]
        if "/vsock" in self.configured:
            self.listen()
        self.go("Running")

    def do_Vm(self, _: str, body: dict[str, Any]) -> None:
        self.go("Paused" if body["state"] == "Paused" else "Running")

    def go(self, state: str) -> None:
        self.state = state
        assert self.guest is not None
        self.guest.running.set() if state == "Running" else self.guest.running.clear()

    def do_SnapshotCreateParams(self, _: str, body: dict[str, Any]) -> None:
        if self.state != "Paused":
            raise Refused(
                "Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running"
            )
        guest = self.guest
        assert guest is not None
        if body.get("snapshot_type") == "Diff" and RELEASE < (1, 13) and not self.tracks:
            raise Refused("Create snapshot error: Cannot get dirty bitmap: No such file or directory (os error 2)")
        saved = json.dumps({"format": FORMAT, "memory": len(guest.memory), "devices": self.configured}).encode()
        with open(body["snapshot_path"], "wb") as file:
            file.write(saved + struct.pack("<Q", zlib.crc32(saved)))
        pages = range(len(guest.memory) // PAGE)
        if body.get("snapshot_type") == "Diff":
            # Without tracking, mincore(2) says what is there: every page of a mapped file that is in the page cache.
            pages = sorted(guest.dirty) if self.tracks else pages
        with open(body["mem_file_path"], "wb") as file:
            os.ftruncate(file.fileno(), len(guest.memory))
            for page in pages:
                os.pwrite(file.fileno(), guest.memory[page * PAGE : (page + 1) * PAGE], page * PAGE)
        guest.dirty.clear()
        for one in guest.connections:  # the vsock device is reset
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        guest.connections.clear()
        guest.losses = [*RESETTING]

    def do_SnapshotLoadParams(self, _: str, body: dict[str, Any]) -> None:
        if self.configured:
            raise Refused("Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.")
        if ("mem_backend" in body) == ("mem_file_path" in body):
            raise Refused("either `mem_backend` or `mem_file_path` is required")
        backend = checked("MemoryBackend", body["mem_backend"])
        overrides = {checked("NetworkOverride", one)["iface_id"]: one["host_dev_name"] for one in body.get("network_overrides", [])}
        try:
            self.load(body["snapshot_path"], backend["backend_path"], overrides)
        except (OSError, ValueError, KeyError) as error:
            threading.Timer(0.05, os._exit, (1,)).start()  # "the current Firecracker process is ended"
            raise Refused(f"Load snapshot error: Failed to restore from snapshot: {error}") from error
        self.tracks = body.get("track_dirty_pages", False) or body.get("enable_diff_snapshots", False)
        self.listen()
        self.go("Running" if body.get("resume_vm") else "Paused")

    def load(self, state: str, memory: str, overrides: dict[str, str]) -> None:
        try:
            with open(state, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ValueError(
                f"Failed to get snapshot state from file: Failed to open snapshot file: {error.strerror} (os error {error.errno})"
            ) from error
        if len(data) < 8 or struct.unpack("<Q", data[-8:])[0] != zlib.crc32(data[:-8]):
            raise ValueError("Failed to get snapshot state from file: Failed to load snapshot state from file: CRC64 validation failed: 0")
        saved = json.loads(data[:-8])
        if saved["format"] != FORMAT:
            raise ValueError(
                f"Failed to get snapshot state from file: Failed to load snapshot state from file: Invalid data version: {saved['format']}.0.0"
            )
        if set(overrides) - {device["iface_id"] for kind, device in saved["devices"].items() if kind.startswith("/network-interfaces")}:
            raise ValueError("Failed to get snapshot state from file: Unknown Network Device.")
        with open(memory, "rb") as file:
            if os.fstat(file.fileno()).st_size != saved["memory"]:
                raise ValueError("the memory file has another size")
            # Only read: writes go to copies (docs/snapshotting/snapshot-support.md).
            mapped = mmap.mmap(file.fileno(), saved["memory"], mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        for kind, device in saved["devices"].items():
            if kind.startswith("/drives"):
                open_disk(device)
            if kind.startswith("/network-interfaces"):
                self.open_tap(overrides.get(device["iface_id"], device["host_dev_name"]))
        self.configured, self.guest = saved["devices"], Guest(mapped)
        self.guest.losses = [*RESETTING]

    def open_tap(self, name: str) -> None:
        """TUNSETIFF, as the process's own user: a persistent tap without an owner is anybody's in its namespace."""
        if self.tap is not None:
            os.close(self.tap)
        self.tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.tap, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x0002 | 0x1000 | 0x4000))

    def listen(self) -> None:
        server = socket.socket(socket.AF_UNIX)
        server.bind(self.configured["/vsock"]["uds_path"])
        server.listen(8)
        threading.Thread(target=self.accept, args=(server,), daemon=True).start()

    def accept(self, server: socket.socket) -> None:
        while True:
            sock, _ = server.accept()
            threading.Thread(target=self.connected, args=(sock,), daemon=True).start()

    def connected(self, sock: socket.socket) -> None:
        with sock:
            line = b""
            while not line.endswith(b"\n"):
                byte = sock.recv(1)
                if not byte:
                    return
                line += byte
            guest = self.guest
            assert guest is not None
            if line != f"CONNECT {AGENT_PORT}\n".encode():
                return
            guest.running.wait()
            loss = guest.losses.pop(0) if guest.losses else ""
            if loss == CLOSED:
                return
            with contextlib.suppress(OSError):
                if loss == SILENT:
                    sock.recv(1)  # until the host gives up
                    return
                sock.sendall(b"OK 1073741824\n")
                if loss == BROKEN:
                    sock.recv(65536)
                    return
                guest.connections.append(sock)
                guest.serve(sock, is_mute=loss == MUTE)


def open_disk(drive: dict[str, Any]) -> None:
    os.close(os.open(drive["path_on_host"], os.O_RDONLY if drive["is_read_only"] else os.O_RDWR))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    vm: Vm

    def handle_call(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        data = self.rfile.read(length)
        try:
            status, answer = 200, self.vm.call(self.command, self.path, json.loads(data) if data else None)
            if answer is None:
                status = 204
        except (Refused, OSError, ValueError) as error:
            status, answer = 400, {"fault_message": str(error)}
        content = b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_PATCH = handle_call

    def address_string(self) -> str:
        return "local"

    def log_message(self, format: str, *words: object) -> None:
        pass


class ApiServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


def main() -> None:
    if "--version" in sys.argv:
        print(f"Firecracker v{VERSION}")
        return
    words = [word for word in sys.argv[1:] if word != "--no-api"]
    given = dict(zip(words[::2], words[1::2], strict=True))
    if set(given) - {"--id", "--api-sock", "--config-file", "--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us"}:
        sys.exit('Error: ParseArguments(UnexpectedArgument("…"))')
    if os.geteuid() == 0 or ctypes.CDLL(None).prctl(38, 1, 0, 0, 0):
        sys.exit("runs as root")
    Handler.vm = Vm(given["--id"])
    if "--config-file" in given:
        try:
            Handler.vm.start(given["--config-file"])
        except NoKernel:
            sys.exit(
                "Error: RunWithoutApiError(BuildMicroVMFromJson(StartMicroVM(ConfigureSystem(KernelLoader(Elf(InvalidElfMagicNumber))))))"
            )
        except (Refused, OSError, KeyError) as error:
            sys.exit(f"Error: RunWithoutApiError(BuildMicroVMFromJson(ParseFromJson({error})))")
        threading.Event().wait()
    with ApiServer(given.get("--api-sock", "/run/firecracker.socket"), Handler) as server:
        server.serve_forever()


main()
