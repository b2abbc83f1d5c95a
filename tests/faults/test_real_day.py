"""A bad day in ten minutes, on real microVMs: thirty sessions of the smallest guest sleep and wake by their clients' requests, while the
disk fills and is freed, descriptors run short, the service's processes and the supervisor are killed, the service's clock jumps, and
the host's QEMU is replaced by another one beside it. A client that was refused asks again. Nobody is lost.

BAD_DAY_SECONDS, BAD_DAY_SESSIONS and BAD_DAY_SEED: a shorter or another day.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from hand import POLICY, Hand, asked, ledger_image
from service import Instance, until
from small_disk import small_disk
from test_updates_of_qemu import cache_of_its_own, doctor, other_qemu

from vmm.qemu.machine import BINARY

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.faults]
_SECONDS = float(os.environ.get("BAD_DAY_SECONDS", "600"))
_SESSIONS = int(os.environ.get("BAD_DAY_SESSIONS", "30"))
_SEED = int(os.environ.get("BAD_DAY_SEED", "1"))
_CLIENTS = 3
_HOLD_SECONDS = 20.0
_JUMP_SECONDS = 600.0  # clients sign with the host's clock, and SigV4 allows 15 minutes
_CHILDREN = ("vmm", "control", "edge-0", "edge-1", "store")
_SAID = ("vmm", "control", "edge-0", "store")  # processes that take what could run short


class Day:
    def __init__(self, one: Instance, hand: Hand, disk: Path, other: Path, image: str) -> None:
        self.one, self.hand, self.disk, self.image = one, hand, disk, image
        self.qemus = [Path(BINARY), other]
        self.chance = random.Random(_SEED)
        self.vms: list[dict[str, Any]] = []
        self.ledger: dict[str, int] = {}
        self.asked_since: Counter[str] = Counter()  # requests whose answer nobody heard: each may have counted
        self.answers: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.troubles: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.is_over = threading.Event()
        self.lock = threading.Lock()

    def launch(self) -> None:
        for _ in range(_SESSIONS):
            vm = self.one.launch(self.image, idlePolicy=POLICY, maximumDurationInSeconds=28_800)
            self.vms.append(vm | {"token": self.one.token(vm["microvmId"], minutes=60)})
            self.ledger[vm["microvmId"]] = 0
            assert self.request(self.vms[-1])
            self.suspend(vm["microvmId"])

    # ---- clients ----

    def client(self, number: int) -> None:
        chance = random.Random(f"{_SEED} {number}")
        own = self.vms[number::_CLIENTS]
        while not self.is_over.is_set():
            vm = chance.choice(own)
            self.request(vm)
            if chance.random() < 0.85:
                self.suspend(vm["microvmId"])
            self.is_over.wait(chance.expovariate(2))

    def request(self, vm: dict[str, Any]) -> bool:
        """One request; whether it was answered by the application. What it counts may not go back, nor go on by itself."""
        name, began = vm["microvmId"], time.monotonic()
        self.asked_since[name] += 1
        try:
            status, (memory, disk) = asked(self.one, vm, _HOLD_SECONDS + 20)
        except (OSError, EOFError) as error:
            self._count(self.answers, f"none ({type(error).__name__})")
            if isinstance(error, TimeoutError):
                self._say(f"{name} has no answer for {time.monotonic() - began:.0f} s")
            return False
        took = time.monotonic() - began
        self._count(self.answers, str(status))
        if status == 200:
            least, most = self.ledger[name] + 1, self.ledger[name] + self.asked_since[name]
            if memory != disk or not least <= memory <= most:
                self._say(f"{name} has counted {memory} in memory and {disk} on its disk, not {least} to {most}")
            self.ledger[name], self.asked_since[name] = memory, 0
        elif status == 502 and took < _HOLD_SECONDS - 1:
            self._say(f"{name} was answered with 502 after {took:.1f} s")
        elif status not in (429, 502, 503, 504):
            self._say(f"{name} was answered with {status}")
        return status == 200

    def suspend(self, name: str) -> None:
        try:
            self.one.client().suspend_microvm(microvmIdentifier=name)
            self._count(self.calls, "200")
        except ClientError as error:
            self._count(self.calls, f"{error.response['ResponseMetadata']['HTTPStatusCode']} {error.response['Error']['Code']}")
        except BotoCoreError as error:
            self._count(self.calls, type(error).__name__)

    def _count(self, what: Counter[str], name: str) -> None:
        with self.lock:
            what[name] += 1

    def _say(self, what: str) -> None:
        with self.lock:
            self.wrong.append(f"{time.monotonic() - self.began:.0f} s: {what}")

    # ---- troubles ----

    def play(self) -> None:
        self.began = time.monotonic()
        threads = [threading.Thread(target=self.client, args=(number,)) for number in range(_CLIENTS)]
        for thread in threads:
            thread.start()
        troubles: list[Callable[[], None]] = []
        try:
            while time.monotonic() - self.began < _SECONDS:
                if not troubles:  # each comes as often as the others
                    troubles = [
                        self.fill,
                        self.fill,
                        self.few_descriptors,
                        self.few_descriptors,
                        self.kill,
                        self.kill,
                        self.kill,
                        self.jump,
                    ]
                    troubles += [self.kill_supervisor, self.replace_qemu]
                    self.chance.shuffle(troubles)
                trouble = troubles.pop()
                self.troubles[trouble.__name__] += 1
                print(f"{time.monotonic() - self.began:4.0f} s: {trouble.__name__}", flush=True)
                trouble()
                self.is_over.wait(self.chance.uniform(1, 4))
        finally:
            self.is_over.set()
            for thread in threads:
                thread.join()
            self.hand.set_clock(0)

    def fill(self) -> None:
        """All but a few blocks is taken, also what is freed meanwhile, for some seconds."""
        filler, until_ = self.disk / "filler", time.monotonic() + self.chance.uniform(2, 6)
        with filler.open("wb") as file:
            while time.monotonic() < until_:
                for size in (1 << 28, 1 << 24, 1 << 20, 1 << 16, 1 << 12):
                    try:
                        while True:
                            os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
                    except OSError as error:
                        assert error.errno == errno.ENOSPC, error
                self.is_over.wait(0.2)
        filler.unlink()

    def few_descriptors(self) -> None:
        """A process can open two more, for some seconds."""
        pid = self.one.pid_of(self.chance.choice(_SAID))
        with contextlib.suppress(OSError):
            used = {int(one) for one in os.listdir(f"/proc/{pid}/fd")}
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            free = [number for number in range(len(used) + 2) if number not in used]  # the lowest are given out first
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[1] + 1, hard))
            self.is_over.wait(self.chance.uniform(2, 5))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))

    def kill(self) -> None:
        child = self.chance.choice(_CHILDREN)
        print(f"        {child}", flush=True)
        self.one.kill(child)

    def jump(self) -> None:
        self.hand.set_clock(self.chance.uniform(-_JUMP_SECONDS, _JUMP_SECONDS))

    def kill_supervisor(self) -> None:
        assert self.one.process is not None
        os.kill(self.one.process.pid, signal.SIGKILL)
        self.one.process.wait()
        self.hand.start(self.qemus[0])

    def replace_qemu(self) -> None:
        """Sleepers of the older one go on under it; what awakes without a snapshot, and what is built, is of the new one."""
        assert self.one.stop() == 0
        left = [path.read_text() for path in self.one.run.glob("badday/vms/*/process.json")]
        if left or (places := sorted(path.name for path in self.one.run.glob("badday/vms/*"))):
            self._say(f"a stop has left {left or places}")
        self.qemus.reverse()
        self.hand.start(self.qemus[0])

    # ---- the evening ----

    def look(self) -> None:
        """With all troubles gone, each session wakes within a minute, and has counted what it was asked."""
        for vm in self.vms:
            try:
                until(lambda vm=vm: self.request(vm), 60, 0.2)
            except TimeoutError:
                self._say(f"{vm['microvmId']} does not wake: {self.one.describe(vm['microvmId'])}")
        aside = sorted(path.name for path in (self.one.root / "quarantine").glob("*"))
        if aside:
            self._say(f"set aside: {aside}, {[text for name, (_, text) in doctor(self.one).items() if name == 'set aside']}")
        known = {vm["microvmId"] for vm in self.vms}
        strangers = {path.name for path in (self.one.root / "sessions").iterdir() if path.is_dir()} - known
        if strangers:
            self._say(f"left: {sorted(strangers)}")


def test_a_bad_day_in_ten_minutes(host_before: object) -> None:
    with cache_of_its_own() as cache, small_disk(8 << 30) as disk:
        one = Instance(
            "badday", 700_000 + 7 * 262_144, ROOT=str(disk / "root"), CACHE=str(cache), LIMITS__DISK_RESERVE_MIB="64", STANDBYS__PER_IMAGE="1",
            STANDBYS__WARM="2", STANDBYS__WARM_SECONDS="5", EDGE__HOLD_SECONDS=str(_HOLD_SECONDS), EDGE__WORKERS="2",
        )  # fmt: skip
        one.root = disk / "root"
        one.environment["TORPOR_CACHE"] = str(cache)
        other = one.directory / "other-qemu"
        other_qemu(other)
        hand = Hand(one)
        try:
            hand.start()
            day = Day(one, hand, disk, other, ledger_image(one))
            day.began = time.monotonic()
            day.launch()
            day.play()
            day.look()
            print(f"{_SESSIONS} sessions, seed {_SEED}, {_SECONDS:g} s; requests: {dict(day.answers)}; suspends: {dict(day.calls)}")
            print(f"troubles: {dict(day.troubles)}; wrong: {len(day.wrong)}")
            one.terminate(*(vm["microvmId"] for vm in day.vms))
        finally:
            if one.process is not None:
                one.stop()
            hand.close()
            log = one.log.read_text()
            if kept := os.environ.get("BAD_DAY_LOG"):
                shutil.copy(one.log, kept)
            one.remove()
    assert not day.wrong, "\n".join(day.wrong)
    assert "Traceback" not in log, log[log.index("Traceback") :][:4000]
