"""An application's microVM as its users have it: its address, the fields of a request, the clients, and the sleep."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from service import REPO, Instance, until
from websockets.sync.client import ClientConnection, connect

from applications.tunnel import tunnel

CLIENTS = REPO / "tests/applications/clients"
INSTALLED = Path(os.environ.get("TORPOR_CLIENTS", REPO / ".venv/clients"))  # make applications-packages


class Visit:
    def __init__(self, instance: Instance, vm: dict[str, Any], port: int, directory: Path) -> None:
        self.instance, self.identifier, self.port, self.directory = instance, str(vm["microvmId"]), port, directory
        self.host = str(vm["endpoint"])
        self.url = f"https://{self.host}"
        self.ca = str(instance.root / "tls/ca.crt")
        self.token = instance.token(self.identifier, minutes=60)
        self.sleeps = 0

    @property
    def trust(self) -> ssl.SSLContext:
        """One of its own for each client: some write into it which protocols they speak."""
        return ssl.create_default_context(cafile=self.ca)

    @property
    def fields(self) -> dict[str, str]:
        return {"X-aws-proxy-auth": self.token, "X-aws-proxy-port": str(self.port)}

    # ---- the sleep ----

    def sleep(self) -> None:
        """SuspendMicrovm, as its user's words or the console's."""
        self.instance.client().suspend_microvm(microvmIdentifier=self.identifier)
        self.asleep()

    def asleep(self, seconds: float = 60) -> None:
        """Waits until it sleeps, by whatever made it."""
        self.instance.state(self.identifier, "SUSPENDED", seconds=seconds)
        self.sleeps += 1

    def nod(self) -> None:
        """SuspendMicrovm where the client speaks all the time: what it says next may wake it before anybody has seen it asleep. The trace of
        its resume is what shows that it was."""
        began = time.time()
        self.instance.client().suspend_microvm(microvmIdentifier=self.identifier)
        until(lambda: any(work == "resume" and at > began for work, at in self._works()), 120, 0.5)
        self.sleeps += 1
        self.awake()

    def awake(self) -> None:
        """What the client did has woken it."""
        self.instance.state(self.identifier, "RUNNING")

    def _works(self) -> list[tuple[str, float]]:
        traces = json.loads(self.instance.command("torpor", "trace", self.identifier, "--json").stdout)
        return [(trace["work"], trace["started_at"]) for trace in traces]

    # ---- clients ----

    def http(self, **options: Any) -> httpx.Client:
        """HTTP/2, as browsers speak it."""
        options = {"http2": True, "timeout": 90, "follow_redirects": True} | options
        options["headers"] = self.fields | options.get("headers", {})
        return httpx.Client(verify=self.trust, base_url=self.url, **options)

    def websocket(self, path: str, **options: Any) -> ClientConnection:
        fields = self.fields | options.pop("additional_headers", {})
        return connect(
            f"wss://{self.host}{path}", ssl=self.trust, additional_headers=fields, max_size=None, open_timeout=60, **options
        )  # fmt: skip

    def run(self, *words: str, seconds: float = 90, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False, **options)
        assert not (check and done.returncode), f"{words[0]} exited with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done

    def curl_words(self, *words: str) -> list[str]:
        given = [part for name, value in self.fields.items() for part in ("-H", f"{name}: {value}")]
        return ["curl", "-sS", "--max-time", "90", "--cacert", self.ca, *given, *words]

    def curl(self, path: str, *words: str, check: bool = True) -> str:
        return self.run(*self.curl_words(*words, f"{self.url}{path}"), check=check).stdout

    def node(self, script: str, path: str = "") -> Node:
        """A program of clients/, beside the packages that it imports."""
        shutil.copy(CLIENTS / script, INSTALLED)
        return Node([_program("node"), str(INSTALLED / script), self.url + path, json.dumps(self.fields)], self.ca)

    @contextlib.contextmanager
    def tunnel(self, path: str = "/") -> Iterator[int]:
        """The local port of a tunnel (tunnel.py) to the TCP server behind this port's websockify."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            opened = tunnel(f"wss://{self.host}{path}", self.fields, self.trust)
            server = asyncio.run_coroutine_threadsafe(opened, loop).result(30)
            yield int(server.sockets[0].getsockname()[1])
            server.close()
        finally:
            asyncio.run_coroutine_threadsafe(_end_tasks(), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(30)
            loop.close()

    @contextlib.contextmanager
    def browser(self) -> Iterator[Any]:
        """A page of Chromium whose requests have the fields, as an extension adds them."""
        from playwright.sync_api import sync_playwright

        with sync_playwright() as started:
            chromium = started.chromium.launch(
                executable_path=_program("chromium"), args=["--no-sandbox", "--disable-quic", "--disable-dev-shm-usage"]
            )  # fmt: skip
            context = chromium.new_context(ignore_https_errors=True, extra_http_headers=self.fields)
            context.set_default_timeout(150_000)
            yield context.new_page()
            context.close()
            chromium.close()


async def _end_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _program(name: str) -> str:
    found = shutil.which(name)
    assert found, f"{name} is missing: make applications-packages installs it"
    return found


class Node:
    """A client in Node.js, which says what it sees in lines of JSON."""

    def __init__(self, words: list[str], ca: str) -> None:
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"NODE_EXTRA_CA_CERTS": ca}
        )  # fmt: skip
        self.seen: list[dict[str, Any]] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def hear(self, name: str, seconds: float = 60) -> dict[str, Any]:
        """The next line that has `name`; others are kept in `seen`, too."""
        while True:
            try:
                line = self._lines.get(timeout=seconds)
            except queue.Empty:
                raise TimeoutError(f"no {name!r} in {seconds} s; seen {self.seen[-10:]}") from None
            assert line is not None, f"the client ended; seen {self.seen[-10:]}"
            said = dict(json.loads(line))
            self.seen.append(said)
            if name in said:
                return said

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for file in (self.process.stdin, self.process.stdout):
            assert file is not None
            with contextlib.suppress(BrokenPipeError):
                file.close()
