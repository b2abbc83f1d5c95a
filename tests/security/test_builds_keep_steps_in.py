"""What a RUN step reaches of the builder, of the host and of other accounts: nothing. A program in one step tries the list (step.c).

The positive control runs the same program as the host's root in a directory that is only chrooted, without namespaces, filter and the
rest, where each attempt succeeds; or takes one wall of the builder's away by its name.
"""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from build_rig import FROM, NAME, Rig, builder

from vmm import build_network
from vmm.egress import addresses_here

pytestmark = pytest.mark.vm
LOGIN = base64.b64encode(b"user:secret-of-a-registry").decode()
# Of the jail's own root, in which the builder's daemon runs.
ATTEMPTS = 21
BUILDERS = ("/out/login/config.json", "/base.tar", "/build.sh", "/lent/environment", "/var/lib/docker/torpor-base")


@pytest.fixture
def step(tmp_path: Path) -> Iterator[Path]:
    """The program, and a process of the host's for it to find."""
    source = Path(__file__).with_name("step.c")
    subprocess.run(["musl-gcc", "-static", "-O1", "-Wall", "-Werror", "-o", tmp_path / "step", source], check=True, timeout=60)
    outside = shutil.copy("/bin/sleep", tmp_path / "torpor-outside")
    with subprocess.Popen([outside, "600"]) as process:
        yield tmp_path / "step"
        process.kill()


@pytest.fixture
async def rig(host_before: object) -> AsyncIterator[Rig]:
    async with builder(store_mib=2048) as one:
        yield one


class Listener:
    """What a build must not reach: a port on every address of the host's. `came` counts connections; each is told a secret."""

    def __init__(self, sock: socket.socket) -> None:
        self.port = sock.getsockname()[1]
        self.came = 0
        self._sock = sock
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._sock.accept()
                self.came += 1
                with client, contextlib.suppress(OSError):
                    client.settimeout(2)
                    client.recv(4096)
                    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\nConnection: close\r\n\r\nhost-s-secret\n")


@pytest.fixture
def listener() -> Iterator[Listener]:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        yield Listener(sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def host_address() -> str:
    found = (one for addresses in addresses_here().values() for one in addresses if not one.startswith("127."))
    return next(found, "") or pytest.skip("the host has no address but loopback")


def tried(said: str) -> dict[str, str]:
    return dict(re.findall(r"tried (.+?): (.+)", said))


def destinations(listener: Listener) -> dict[str, str]:
    return {"the host by its address": f"{host_address()}:{listener.port}", "the host's loopback": f"10.0.2.2:{listener.port}"}


def words(files: tuple[str, ...], places: dict[str, str]) -> str:
    return " ".join([*files, "--", *(f'"{name}={place}"' for name, place in places.items())])


async def test_a_step_reaches_nothing_of_the_builder_and_of_the_host(rig: Rig, step: Path, listener: Listener) -> None:
    places = destinations(listener)
    dockerfile = f"""FROM {NAME} AS one
COPY step /step
RUN ln -s / /up
FROM one
RUN echo poisoned >> /etc/debian_version
RUN /step {words(BUILDERS, places)}
RUN --mount=type=bind,from=one,source=/up,target=/m,rw /step {" ".join(f"/m{file}" for file in BUILDERS)} -- | sed -n 's/files of the/& bound/p'
RUN --mount=type=cache,id=../../../../../../,target=/c echo "cache: $(ls -A /c | wc -l)"
"""
    done, said = await rig.build(dockerfile, logins={"registry.example": LOGIN}, programs={"step": step})
    assert done.status == 0, said
    found = tried(said)
    print("\n".join(f"{name}: {what}" for name, what in found.items()))
    assert len(found) == ATTEMPTS + 1 + len(places) and not [name for name, what in found.items() if what == "done"]
    assert "cache: 0" in said and LOGIN not in said and not listener.came
    assert found["the host by its address"] == "Connection refused", "by the packet filter"
    other, said = await rig.build(f"{FROM}RUN cat /etc/debian_version", "222222222222")
    assert other.status == 0 and "poisoned" not in said, "the local base is another's too, and nobody's to write to"


def test_without_the_walls_each_of_it_succeeds(step: Path, tmp_path: Path, listener: Listener) -> None:
    """Positive control: the same program in a directory of the host, as its root."""
    root = tmp_path / "root"
    for name in ("proc", "sys", "dev/.lent", "tmp"):
        (root / name).mkdir(parents=True)
    for path in (root / "planted", tmp_path / "above"):
        path.touch()
    (root / "step").write_bytes(step.read_bytes())
    (root / "step").chmod(0o755)
    enter = f'mount --rbind /proc "{root}/proc" && mount --rbind /sys "{root}/sys" && exec chroot "{root}" /step "$@"'
    arguments = ["/planted", str(tmp_path / "above"), "--", f"the host by its address={host_address()}:{listener.port}"]
    with open(tmp_path / "above") as kept:
        ran = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", enter, "sh", *arguments],
            capture_output=True, text=True, timeout=60, check=True, pass_fds=[kept.fileno()],
        )  # fmt: skip
    found = tried(ran.stdout)
    assert len(found) == ATTEMPTS + 1
    assert [name for name, what in found.items() if what != "done"] == ["a user namespace"] and listener.came == 1
    # Nobody who is only chrooted may have one (user_namespaces(7)); whoever is not, may.
    enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", 'mount -t tmpfs none /tmp && exec "$@"', "sh"]
    direct = subprocess.run([*enter, root / "step", "--"], capture_output=True, text=True, timeout=60, check=True)
    assert tried(direct.stdout)["a user namespace"] == "done"


async def test_without_the_filter_a_step_reaches_the_host(
    rig: Rig, step: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positive control: rules that close nothing, and slirp4netns without its own wall around the host's loopback."""
    _open_network(rig, monkeypatch)
    dockerfile = f"{FROM.replace('CMD true', 'COPY step /step')}RUN /step -- {words((), destinations(listener))[3:]}\n"
    done, said = await rig.build(dockerfile, programs={"step": step})
    assert done.status == 0, said
    assert [tried(said)[name] for name in destinations(listener)] == ["done", "done"] and listener.came == 2


def _open_network(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.builder, "_close_private", lambda namespace, registries: None)
    start = build_network.asyncio.create_subprocess_exec

    async def without(*arguments: str, **named: Any) -> Any:
        return await start(*(one for one in arguments if one != "--disable-host-loopback"), **named)

    monkeypatch.setattr(build_network.asyncio, "create_subprocess_exec", without)


async def test_copy_follows_a_link_inside_of_the_tree_and_none_out_of_it(rig: Rig) -> None:
    """The builder's own root has the login, at the place to which the link leads."""
    links = {"absolute": "/out/login/config.json", "climbing": "../../../../../out/login/config.json", "inside": "Dockerfile"}
    kept, said = await rig.build(f"{FROM}COPY inside /got\nRUN cat /got\n", links=links, logins={"registry.example": LOGIN})
    assert kept.status == 0 and said.count("COPY inside /got") >= 2, "positive control: a link is followed"
    for link in ("absolute", "climbing"):
        done, said = await rig.build(f"{FROM}COPY {link} /got\nRUN cat /got\n", links=links, logins={"registry.example": LOGIN})
        assert done.status and "not found" in said and LOGIN not in said, said


@pytest.mark.long
async def test_the_front_ends_own_sources_reach_nothing_private(rig: Rig, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """ADD by HTTP and by git, `# syntax=`, which names an image, and FROM. Control: the same without the walls, but for git, which the
    builder does not have."""
    place = f"{host_address()}:{listener.port}"
    sources = {
        "http": f"{FROM}ADD http://{place}/x /x\n", "git": f"{FROM}ADD http://{place}/x.git#main /x\n",
        "syntax": f"# syntax={place}/front:1\n{FROM}", "image": f"FROM {place}/image:1\nCMD true\n",
    }  # fmt: skip
    for name, dockerfile in sources.items():
        done, said = await rig.build(dockerfile)
        assert done.status and not listener.came and "host-s-secret" not in said, (name, said)
    _open_network(rig, monkeypatch)
    rig.allow_pulls()
    for name, dockerfile in sources.items():
        before = listener.came
        done, said = await rig.build(dockerfile)
        assert listener.came > before or (name == "git" and '"git": executable file not found' in said), (name, said)
