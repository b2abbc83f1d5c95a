"""Who may import whom (docs/architecture.md): the edge knows no images and no API, vmm nothing of sessions; and inside a package, imports
run one way. Every import counts: also those under TYPE_CHECKING and inside functions, because who reads one side has to know the other."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]

# Package to what of the project it may import, besides itself.
ALLOWED = {
    "gateway.edge": {"gateway.config", "gateway.messages", "gateway.observe", "gateway.process", "gateway.reach", "gateway.rpc", "gateway.tasks", "gateway.suites", "gateway.tokens", "gateway.listeners"},
    "gateway.sessions": {"gateway.config", "gateway.executors", "gateway.files", "gateway.messages", "gateway.reach", "gateway.rpc", "gateway.tasks", "gateway.accounts.model", "gateway.observe.room", "gateway.observe.steps", "gateway.observe.demand"},
    "gateway.accounts": {"gateway.config", "gateway.messages", "gateway.rpc", "gateway.sessions.store"},
    "gateway.images": {"gateway.observe.room", "gateway.accounts.directory", "gateway.accounts.quotas", "gateway.confine", "gateway.config", "gateway.executors", "gateway.messages", "gateway.reach", "gateway.rpc", "gateway.sessions", "gateway.tasks"},
    "gateway.guest": {"gateway.addresses", "gateway.config", "gateway.confine", "gateway.observe.room", "gateway.peers", "gateway.reach", "gateway.rpc", "gateway.sessions.allowance", "gateway.sessions.host", "gateway.executors", "gateway.messages", "gateway.accounts.directory", "gateway.sessions.egress", "gateway.sessions.model", "gateway.sessions.store"},
    "gateway.observe": {"gateway.config", "gateway.messages", "gateway.rpc", "gateway.sessions.states"},
    "vmm": {"gateway.addresses", "gateway.config", "gateway.descriptors", "gateway.executors", "gateway.files", "gateway.messages", "gateway.observe", "gateway.peers", "gateway.process", "gateway.rpc", "gateway.tasks"},
    "gateway.cli": {"gateway.backup", "gateway.config", "gateway.confine", "gateway.instance", "gateway.status", "gateway.supervisor", "vmm.assets", "vmm.disks", "vmm.network", "vmm.standbys", "vmm.syscalls", "vmm.base", "vmm.probe", "vmm.cgroups", "vmm.errors", "vmm.handout", "vmm.host_setup", "vmm.host_security", "vmm.jail", "vmm.kernel", "vmm.qemu.roots", "vmm.kvm_device", "vmm.quarantine", "vmm.leftovers", "vmm.making", "vmm.upgrades", "vmm.own_groups", "vmm.walls_seen", "gateway.own_walls", "gateway.listeners", "gateway.process", "gateway.sessions.logs", "gateway.sessions.model", "gateway.sessions.quarantine", "gateway.sessions.states", "gateway.sessions.store", "gateway.observe", "gateway.rpc", "gateway.messages"},
}  # fmt: skip


# Package to its rooms, lowest first: a module, a sub-package, or several that share a room. Imports go to rooms before, or stay in the room.
ROOMS: dict[str, list[str | tuple[str, ...]]] = {
    "gateway.edge": [("", "native"), "reading", "wire", "policy", ("failures", "sides"), "records", "origin", "client", "link", "worker", "__main__"],
    "gateway.sessions": [
        ("allowance", "frame", "states", "deadlines", "hooks", "listeners", "out_of_memory", "database", "log_names"), "logs", ("model", "schema"), "store", ("egress", "faults", "host", "line_writer", "shells", "shipping"),
        ("room", "agent", "routes", "archive"), ("timers", "liveness", "channels", "transitions", "ahead", "archiving"), "actions", "lifecycle", ("recovery", "quarantine"), "identity",
    ],
    "vmm": [
        ("", "calls", "digests", "errors", "jail", "programs", "provenance", "syscalls"), ("beneath", "cgroups", "processor", "seals", "encryption", "diffs", "disks", "generators", "making", "namespaces", "own_groups", "sparse"),
        ("egress", "kernel", "memory", "snapshots"), ("mapping", "mirrors", "network", "owed", "quarantine", "registry"),
        ("base", "build_mirrors", "build_stores", "builder_root", "driver"), ("leftovers", "manifest", "sandboxes", "sealing", "archives", "standbys", "vms"),
        ("build_network", "watched"), ("builds", "firecracker", "handout", "images", "qemu", "snapshot_gc"), ("host_security", "host_setup", "kvm_device", "probe", "upgrades", "walls_seen", "warm_pool"),
        ("assets", "drivers", "rpc"), "daemon", "serving", "__main__",
    ],
}  # fmt: skip


def imports(file: Path, package: str) -> set[str]:
    """Absolute names of the project's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")
            prefix = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (prefix, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return {name for name in found if name.split(".")[0] in ("gateway", "vmm")}


def modules(root: Path, package: str) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of a package's modules and of those of its sub-packages. A package's name is that of its __init__."""
    for file in sorted((root / package.replace(".", "/")).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def strays(root: Path, package: str, rooms: Sequence[str | tuple[str, ...]]) -> list[str]:
    """What is wrong with a package's rooms: modules without one, rooms without modules, imports that go up, and circles."""
    number = {name: at for at, room in enumerate(rooms) for name in (room if isinstance(room, tuple) else (room,))}
    files = dict(modules(root, package))

    def room_of(module: str) -> str:
        return module.removeprefix(package).lstrip(".").partition(".")[0]

    found = [f"{name} is no module of {package}" for name in number if not any(room_of(module) == name for module in files)]
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        own = room_of(module)
        if own and own not in number:
            found.append(f"{module} has no room")
            continue
        parent = module if file.name == "__init__.py" else module.rpartition(".")[0]
        wanted = {one for one in imports(file, parent) if one in files and one not in (module, package)}
        # `from .sub import module` names both: what is meant is the module.
        graph[module] = {one for one in wanted if not any(other.startswith(f"{one}.") for other in wanted)}
        found += [f"{module} imports {one}" for one in sorted(graph[module]) if number.get(room_of(one), -1) > number.get(own, -1)]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("circle: " + " -> ".join(error.args[1]))
    return found


def test_what_reads_and_writes_messages_knows_no_event_loop() -> None:
    """Parsers and the HTTP/2 machine are tested without sockets and clocks."""
    files = dict(modules(REPO, "gateway.edge.wire"))
    assert "gateway.edge.wire.http2_connection" in files, "there is something to look at"
    for file in [*files.values(), REPO / "gateway/edge/reading.py"]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        found |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in found} & {"asyncio", "socket", "ssl", "uvloop"}, file


@pytest.mark.parametrize("package", ROOMS)
def test_imports_inside_a_package_run_one_way(package: str) -> None:
    assert len(list(modules(REPO, package))) > len(ROOMS[package]), "there is something to look at"
    assert not strays(REPO, package, ROOMS[package])


@pytest.mark.parametrize(
    ("where", "line", "expected"),
    [
        ("low.py", "", None),
        ("high.py", "from .low import f", None),
        ("high.py", "from gateway.thing.sub.inner import f", None),
        ("low.py", "from .high import f", "gateway.thing.low imports gateway.thing.high"),
        ("low.py", "def g():\n    from . import high", "gateway.thing.low imports gateway.thing.high"),
        ("low.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gateway.thing.high", "gateway.thing.low imports gateway.thing.high"),
        ("sub/inner.py", "from ..high import f", "gateway.thing.sub.inner imports gateway.thing.high"),
        ("sub/inner.py", "from . import other", None),
        ("sub/__init__.py", "from .inner import f", None),
        ("__init__.py", "from .low import f", "gateway.thing imports gateway.thing.low"),
        ("unknown.py", "", "gateway.thing.unknown has no room"),
    ],
)  # fmt: skip
def test_each_kind_of_import_that_goes_up_is_found(tmp_path: Path, where: str, line: str, expected: str | None) -> None:
    package = tmp_path / "gateway/thing"
    (package / "sub").mkdir(parents=True)
    for name in ("__init__", "low", "high", "sub/__init__", "sub/inner", "sub/other"):
        (package / f"{name}.py").write_text("")
    (package / where).write_text(line)
    assert strays(tmp_path, "gateway.thing", ["low", "sub", "high"]) == ([expected] if expected else [])


def test_circles_in_a_room_and_rooms_that_are_empty_are_found(tmp_path: Path) -> None:
    package = tmp_path / "gateway/thing"
    package.mkdir(parents=True)
    (package / "one.py").write_text("from . import two")
    (package / "two.py").write_text("def f():\n    from .one import g")
    found = strays(tmp_path, "gateway.thing", [("one", "two"), "gone"])
    assert found[0] == "gone is no module of gateway.thing" and found[1].startswith("circle: ") and len(found) == 2


@pytest.mark.parametrize("package", ALLOWED)
def test_imports(package: str) -> None:
    for _, file in modules(REPO, package):
        for name in imports(file, ".".join(file.relative_to(REPO).parent.parts)):
            if name in ("gateway", "vmm") or name.startswith(package):
                continue
            assert any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED[package]), f"{file.name} imports {name}"


# Who still has threads elsewhere than in gateway/executors.py, and why.
OWN_THREADS = {
    "gateway/executors.py": "the pools",
    "gateway/edge/records/access_log.py": "one for the process, started with it: the edge has no pools",
    "gateway/objectstore.py": "one for the process: a thread for each client is werkzeug's way, and these wait for the loop that asks control",
}  # fmt: skip
THREADS = {"to_thread", "run_in_executor", "Thread", "ThreadPoolExecutor", "start_new_thread"}


def test_blocking_work_is_done_in_the_pools_only() -> None:
    """The event loop's default executor starts a thread whenever it likes, has no deadline, and is everybody's."""
    found = {}
    for package in ("gateway", "vmm"):
        for _, file in modules(REPO, package):
            names = {node.attr for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)}
            names |= {node.id for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
            if names & THREADS:
                found[str(file.relative_to(REPO))] = names & THREADS
    assert found.pop("gateway/executors.py") == {"start_new_thread"}, "there is something to look at"
    assert not {file: names for file, names in found.items() if file not in OWN_THREADS}


def test_the_edge_holds_nothing_that_signs() -> None:
    files = dict(modules(REPO, "gateway.edge"))
    assert "gateway.edge.worker" in files, "there is something to look at"
    for file in files.values():
        assert "Minter" not in file.read_text(encoding="utf-8"), file


def test_the_project_names_all_its_packages() -> None:
    named = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    there = {".".join(path.relative_to(REPO).parts[:-1]) for top in ("gateway", "vmm") for path in (REPO / top).glob("**/__init__.py")}
    assert set(named) == there
