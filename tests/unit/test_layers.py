"""Who may import whom (docs/architecture.md): the edge knows no images and no API, vmm nothing of sessions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from gateway.images.container import LENT_PREFIX
from vmm.lending import MOUNT

REPO = Path(__file__).resolve().parents[2]

# Package to what of the project it may import, besides itself.
ALLOWED = {
    "gateway.edge": {"gateway.config", "gateway.messages", "gateway.observe", "gateway.process", "gateway.rpc", "gateway.tokens", "gateway.listeners"},
    "gateway.sessions": {"gateway.config", "gateway.messages", "gateway.rpc", "gateway.accounts.model", "gateway.observe.room", "gateway.observe.steps", "gateway.observe.use"},
    "gateway.accounts": {"gateway.config", "gateway.messages", "gateway.rpc", "gateway.sessions.store"},
    "gateway.images": {"gateway.accounts.directory", "gateway.config", "gateway.messages", "gateway.rpc", "gateway.sessions"},
    "gateway.guest": {"gateway.config", "gateway.messages", "gateway.accounts.directory", "gateway.sessions.egress", "gateway.sessions.model", "gateway.sessions.store"},
    "gateway.observe": {"gateway.config", "gateway.messages", "gateway.rpc", "gateway.sessions.states"},
    "vmm": {"gateway.config", "gateway.messages", "gateway.observe", "gateway.process", "gateway.rpc"},
    "gateway.cli": {"gateway.config", "gateway.instance", "gateway.supervisor", "vmm.assets", "vmm.probe", "vmm.cgroups", "vmm.errors", "vmm.leftovers", "gateway.listeners", "gateway.process", "gateway.sessions.logs", "gateway.sessions.model", "gateway.observe", "gateway.rpc", "gateway.messages"},
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


@pytest.mark.parametrize("package", ALLOWED)
def test_imports(package: str) -> None:
    for file in (REPO / package.replace(".", "/")).rglob("*.py"):
        own = ".".join(file.relative_to(REPO).parent.parts)
        for name in imports(file, own):
            if name in ("gateway", "vmm") or name.startswith(package):
                continue
            assert any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED[package]), f"{file.name} imports {name}"


def test_the_edge_holds_nothing_that_signs() -> None:
    for file in (REPO / "gateway/edge").glob("*.py"):
        assert "Minter" not in file.read_text(encoding="utf-8"), file


def test_where_lent_settings_lie_is_said_the_same_in_both_halves() -> None:
    assert LENT_PREFIX == MOUNT
