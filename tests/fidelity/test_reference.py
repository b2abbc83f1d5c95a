"""The same Dockerfiles, built and run by Debian 13's dockerd outside our pipeline: what comes out is compared, not guessed.

What we give otherwise stands in differences.py, with the reason; docs/images.md has it from there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scratch import scratch
from service import ROLE, Instance
from wire import get

from fidelity import trees
from fidelity.contexts import CONTEXTS, STEP_NAMES, STEPS, Context
from fidelity.differences import FILES, PROCESS, STEP, Difference
from vmm import builder_root

pytestmark = [pytest.mark.vm, pytest.mark.long]
HERE = Path(__file__).parent
NAME = "public.ecr.aws/lambda/microvms:al2023-minimal"
# What starts a container, and with it `docker run`: builds have no use for it.
_SHIM = "containerd-shim"
_SECONDS = 900
PROBED = [context.name for context in CONTEXTS if context.probed]
_PROBE = f"python3 - <<'END'\n{(HERE / 'probe.py').read_text()}\nEND"


@dataclass
class Reference:
    """What the reference made of the contexts, since `since`."""

    archive: tarfile.TarFile
    answers: Mapping[str, dict[str, Any]]
    steps: Mapping[str, dict[str, Any]]
    since: float


@pytest.fixture(scope="session")
def reference(instance: Instance, server: bytes) -> Iterator[Reference]:
    with scratch(".torpor-reference-") as work:
        tools = work / "tools"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder_root, "_LEFT_OUT", tuple(path for path in builder_root._LEFT_OUT if _SHIM not in path))
            builder_root.make_root(tools)
        since = time.time()
        for context in CONTEXTS:
            context.lay_out(work / "contexts" / context.name, server)
        STEPS.lay_out(work / "steps", server)
        (work / "probe").write_text(_PROBE)
        (work / "names").write_text(" ".join(PROBED))
        cache = Path(instance.environment["TORPOR_CACHE"])
        try:
            done = subprocess.run(
                [
                    *("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"),
                    *("sh", str(HERE / "reference.sh"), str(tools), str(cache / "base.tar"), NAME, str(work)),
                ],
                capture_output=True, text=True, timeout=_SECONDS, check=False, env={"PATH": os.environ["PATH"]},
            )  # fmt: skip
        finally:
            _remove_groups()
        assert done.returncode == 0, done.stdout + done.stderr
        answers = {name: json.loads((work / f"out/{name}.json").read_text()) for name in PROBED}
        with tarfile.open(work / "out/images.tar") as archive:
            yield Reference(archive, answers, _found(work / "out/found"), since)


def _found(directory: Path) -> dict[str, dict[str, Any]]:
    """What steps wrote down."""
    return {path.stem: json.loads(path.read_text()) for path in directory.glob("*.json")}


def _remove_groups() -> None:
    """Control groups that dockerd made, of version 1 and of version 2."""
    for place in [*Path("/sys/fs/cgroup").glob("*/torpor-reference"), *Path("/sys/fs/cgroup").glob("torpor-reference")]:
        for directory, _, _ in os.walk(place, topdown=False):
            os.rmdir(directory)


@dataclass
class Made:
    """An image of the service's, and where its disk is."""

    arn: str
    disk: Path


@pytest.fixture(scope="session")
def images(instance: Instance, server: bytes, reference: Reference) -> dict[str, Made]:
    """The same contexts' images, built by the service, one after another: the new directory is the image's."""
    return {context.name: _made(instance, context, server) for context in CONTEXTS}


def _made(instance: Instance, context: Context, server: bytes) -> Made:
    before = set(instance.root.glob("images/*"))
    arn = instance.create(f"reference-{context.name}", instance.upload(context.packed(server), f"reference-{context.name}.zip"))
    build = instance.built(arn, seconds=240)
    assert build["buildState"] == "SUCCESSFUL", build
    (directory,) = set(instance.root.glob("images/*")) - before
    return Made(arn, directory / "disk.raw")


@pytest.fixture(scope="session")
def steps(instance: Instance, server: bytes) -> dict[str, dict[str, Any]]:
    """What steps found in a build of the service's."""
    with scratch(".torpor-steps-") as work:
        _in_disk(_made(instance, STEPS, server).disk, f'cp /mnt/found/*.json "{work}"')
        return _found(work)


def _in_disk(disk: Path, command: str) -> str:
    """A command's output, with the disk at /mnt, in a mount namespace of its own."""
    command = f'mount -o ro,loop,noload "{disk}" /mnt && {command}'
    done = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _disk_tree(disk: Path, since: float) -> trees.Tree:
    return dict(json.loads(_in_disk(disk, f'exec "{sys.executable}" "{trees.__file__}" /mnt {since}')))


def _differences(reference: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is not the same, by its name: the reference's, and ours."""
    found = {}
    for name in sorted(reference.keys() | ours.keys()):
        a, b = reference.get(name), ours.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= {f"{name} {below}": pair for below, pair in _differences(a, b).items()}
        elif a != b:
            found[name] = a, b
    return found


class Seen:
    """Known differences that tests have found, and how many of them have run."""

    def __init__(self) -> None:
        self.known: set[Difference] = set()
        self.tests = 0

    def unexpected(self, found: Mapping[str, tuple[Any, Any]], known: Sequence[Difference]) -> str:
        """Those that no known difference names, a line each."""
        self.tests += 1
        lines = []
        for name, (a, b) in found.items():
            explained = [one for one in known if one.is_it(name, a, b)]
            self.known |= set(explained)
            lines += [] if explained else [f"{name}: {a!r} in the reference, {b!r} here"]
        return "\n".join(lines)


@pytest.fixture(scope="session")
def seen() -> Seen:
    return Seen()


@pytest.mark.parametrize("name", [context.name for context in CONTEXTS])
def test_the_tree_of_files_is_the_references(reference: Reference, images: dict[str, Made], seen: Seen, name: str) -> None:
    tree, _ = trees.of_image(reference.archive, f"reference/{name}", reference.since)
    unexpected = seen.unexpected(_differences(trees.with_hard_links(tree), _disk_tree(images[name].disk, reference.since)), FILES)
    assert not unexpected, unexpected


@pytest.mark.parametrize("name", PROBED)
def test_a_process_finds_what_it_finds_under_docker(
    instance: Instance, reference: Reference, images: dict[str, Made], seen: Seen, name: str
) -> None:
    vm = instance.launch(images[name].arn, executionRoleArn=ROLE)
    answer = get(vm["endpoint"], instance.root / "tls/ca.crt", instance.token(vm["microvmId"]), "/run", method="POST", body=_PROBE.encode())
    instance.terminate(vm["microvmId"])
    unexpected = seen.unexpected(_differences(reference.answers[name], json.loads(answer.body)), PROCESS)
    assert not unexpected, unexpected


@pytest.mark.parametrize("name", STEP_NAMES)
def test_a_step_finds_what_it_finds_under_buildkit(reference: Reference, steps: dict[str, dict[str, Any]], seen: Seen, name: str) -> None:
    unexpected = seen.unexpected(_differences(reference.steps[name], steps[name]), STEP)
    assert not unexpected, unexpected


def test_what_is_listed_as_different_is_different(seen: Seen) -> None:
    if seen.tests < len(CONTEXTS) + len(PROBED) + len(STEP_NAMES):
        pytest.skip("the other tests of this module are not all selected")
    assert set(FILES + PROCESS + STEP) == seen.known
