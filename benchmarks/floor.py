"""The floor: the same hypervisor, guest and snapshot driven by a script. No jail, no control group, no service, no TLS."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway.config import Settings
from gateway.sessions.agent import wake_frame
from gateway.sessions.frame import frame
from vmm import diffs, manifest, mapping, memory, namespaces, network, sparse, syscalls
from vmm.disks import sync_path
from vmm.qemu import machine

_WOKEN = 0x82
MAPPER = Settings().cache / "qemu-root/usr/lib/torpor-mapper.so"


def cpu_seconds(pid: int) -> float:
    """Processor time of a process's threads so far (Documentation/scheduler/sched-stats.rst)."""
    return sum(int(one.read_text(encoding="ascii").split()[0]) for one in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


class Floor:
    """One restored microVM after another, each from a process that waits, as the service's do."""

    def __init__(self, image: Path, session: str, snapshot: Path, overlay: Path, directory: Path) -> None:
        self.image, self.session, self.snapshot, self.overlay, self.directory = image, session, snapshot, overlay, directory
        known = manifest.peek(image)
        self.shape, self.machine, self.processor = known.shape, known.made.machine, known.made.processor
        self.memory = memory.new_memory(image.name, (image / "memory.raw").stat().st_size)
        sparse.fill(image / "memory.raw", self.memory)
        self.holes = sparse.holes(self.memory)
        template = (image / "overlay.qcow2").read_bytes()
        self.placeholders = machine.PlaceholderDevices(memory.sealed("floor-disk", template), network.open_placeholder_tap())

    def standby(self) -> None:
        """Everything that the service has ready before a request comes: the process, the link, a copy of the disk."""
        self.work = self.directory / secrets.token_hex(4)
        self.work.mkdir()
        shutil.copy(self.overlay, self.work / "overlay")
        namespaces.make_namespace(self.work / "netns", lambda: namespaces.run_batch(network.SETUP))
        qmp, agent = self._listen("qmp"), self._listen("agent")
        base, boot_layer = os.open(self.image / "disk.raw", os.O_RDONLY), os.open(self.image / "boot.qcow2", os.O_RDONLY)
        state = os.open(self.work / "devices.state", os.O_WRONLY | os.O_CREAT)
        ends = machine.Ends(qmp.fileno(), agent.fileno(), state)
        command = machine.standby(self.shape, self.processor, self.machine, self.memory, base, boot_layer, self.placeholders, ends)
        ours, theirs = socket.socketpair()
        environment = {"LD_PRELOAD": str(MAPPER), "TORPOR_MAPPER": str(theirs.fileno())}
        self.process = subprocess.Popen(
            command.arguments, pass_fds=[*command.descriptors, theirs.fileno()], stdin=subprocess.DEVNULL, env=environment
        )
        theirs.close()
        self.mapper = mapping.Mapper(ours)
        self.qmp = self._connect("qmp")
        self.replies = self.qmp.makefile("rb")
        self.replies.readline()
        self._run("qmp_capabilities")
        self._run("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        self.incoming, theirs = socket.socketpair()
        self._run("getfd", [theirs.detach()], fdname="state")
        self._run("migrate-incoming", uri="fd:state")
        self.agent = self._connect("agent")
        self.guest = memory.find_mapping(self.process.pid, self.image.name)
        mapping.clear(self.guest, self.mapper, self.holes)

    def restore(self, is_launch: bool) -> float:
        """Loads a state, runs it, waits for its agent and for the first byte of an answer; the seconds it took."""
        started = time.perf_counter()
        source = self.image if is_launch else self.snapshot
        tap, overlay = self._inside(lambda: syscalls.open_tap(network.TAP)), os.open(self.work / "overlay", os.O_RDWR)
        self.mapper.replace_fd(tap, self.placeholders.tap)
        self.mapper.replace_fd(overlay, self.placeholders.disk)
        os.close(tap)
        os.close(overlay)
        if not is_launch:
            mapping.load(self.guest, self.mapper, source, diffs.read_manifest(source, self.session))
        self.mapper.finish()
        self.incoming.sendall((source / "devices.state").read_bytes())
        while (event := json.loads(self.replies.readline())).get("data", {}).get("status") != "completed":
            assert "event" in event, event
        nonce = secrets.randbits(63)
        wake = bytearray(wake_frame(nonce, reset_tcp=False))  # as the service, whose guests have no way out here
        struct.pack_into("<Q", wake, 12, time.time_ns())
        self.agent.sendall(wake)
        self._run("cont")
        answer, wanted = b"", frame(_WOKEN, struct.pack("<Q", nonce))
        while wanted not in answer:
            answer += self.agent.recv(65536)
        guest = self._inside(socket.socket)
        guest.connect((network.GUEST_ADDRESS, 8080))
        guest.sendall(b"GET / HTTP/1.1\r\nHost: floor\r\n\r\n")
        guest.recv(1)
        return time.perf_counter() - started

    def suspend(self) -> float:
        """Stops the guest and makes its state durable; the seconds it took."""
        started = time.perf_counter()
        target = self.work / "snapshot"
        target.mkdir()
        self._run("stop")
        self._run("xen-save-devices-state", filename=f"/dev/fdset/{machine.STATE_SET}", live=False)
        sync_path(self.work / "devices.state")
        memory.save_diff(self.guest, target, 1)
        for name in diffs.names([1]):
            with (target / name).open("rb") as written:
                os.fsync(written.fileno())
        with (self.work / "overlay").open("rb") as overlay:
            os.fsync(overlay.fileno())
        sync_path(target)
        return time.perf_counter() - started

    def end(self) -> None:
        for end in (self.mapper, self.incoming, self.agent):
            end.close()
        self.process.kill()
        self.process.wait()
        namespaces.destroy_namespace(self.work / "netns")
        shutil.rmtree(self.work)

    def close(self) -> None:
        for descriptor in (self.memory, self.placeholders.disk, self.placeholders.tap):
            os.close(descriptor)

    def cpu_seconds(self) -> float:
        """Processor time of the hypervisor so far."""
        return cpu_seconds(self.process.pid)

    def _listen(self, name: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(self.work / name))
        sock.listen(1)
        return sock

    def _connect(self, name: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.work / name))
        return sock

    def _run(self, command: str, descriptors: list[int] | None = None, **arguments: Any) -> Any:
        message = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self.qmp, [message], descriptors or [])
        for descriptor in descriptors or []:
            os.close(descriptor)
        while "return" not in (reply := json.loads(self.replies.readline())):
            if "error" in reply:
                raise RuntimeError(f"{command}: {reply['error']['desc']}")
        return reply["return"]

    def _inside(self, work: Callable[[], Any]) -> Any:
        made: list[Any] = []

        def enter() -> None:
            with (self.work / "netns").open() as namespace:
                syscalls.setns(namespace.fileno(), syscalls.CLONE_NEWNET)
            made.append(work())

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return made[0]
