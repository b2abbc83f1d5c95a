"""The data path compiled: mypyc makes it from the same sources that otherwise are interpreted.

The result lies in the virtual environment, in a directory that is named by a digest of the sources. The package looks there
first (`__init__.py`), so what was compiled is used for exactly these sources and for no others: after an edit they are
interpreted until they are compiled again. TORPOR_INTERPRETED=1 leaves the compiled form aside.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path

# What a request or its bytes pass through. Their classes cannot inherit from asyncio's, which uvloop does not ask for.
MODULES = (
    "client/exchange",
    "client/forwarding",
    "client/http1",
    "client/http2",
    "client/tls",
    "failures",
    "origin/http1",
    "origin/http2",
    "origin/pool",
    "origin/upstream",
    "policy/admission",
    "policy/fairness",
    "policy/head_cache",
    "policy/keys",
    "policy/limits",
    "policy/replies",
    "policy/routes",
    "reading",
    "records/counters",
    "records/record",
    "sides",
    "wire/chunked",
    "wire/http1_head",
    "wire/http2_connection",
    "wire/http2_flow",
    "wire/http2_frames",
    "wire/http2_head",
    "wire/read_ahead",
    "wire/request_body",
    "wire/websocket",
)
_HERE = Path(__file__).resolve().parent
_PREFIX = "torpor-edge-"


def directory() -> Path:
    """Where the compiled form of these sources is, if there is one."""
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted([*_HERE.rglob("*.py"), *_HERE.parent.glob("*.py")]):  # types of the package around it are compiled in
        digest.update(str(file.relative_to(_HERE.parent)).encode() + b"\0" + file.read_bytes())
    return Path(sys.prefix) / "lib" / f"{_PREFIX}{digest.hexdigest()[:16]}"


def is_wanted() -> bool:
    return not os.environ.get("TORPOR_INTERPRETED")


def lead(path: list[str], room: str = "") -> None:
    """Puts what was compiled of a package of the edge in front of its sources, where it is wanted and there. `path` is the package's
    `__path__`, `room` the name of a package inside the edge."""
    if is_wanted() and (compiled := directory()).is_dir():
        path.insert(0, str(compiled / room))


def build() -> None:
    """Raises what setuptools raises where there is no compiler or no Python.h."""
    from mypyc.build import mypycify
    from setuptools import Distribution

    target = directory()
    os.chdir(_HERE.parents[1])
    lefts = list(target.parent.glob(f"{_PREFIX}*"))  # by one that was ended, or of other sources
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=target.parent) as work:
        for left in lefts:  # they lose their names at once and are removed with `work`: half of one is never found under its name
            left.rename(f"{work}/{left.name}")
        sources = [f"gateway/edge/{name}.py" for name in MODULES]
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                extensions = mypycify(sources, opt_level="1", debug_level="0", group_name="gateway.edge.native", target_dir=f"{work}/c")
        except SystemExit:
            print(said.getvalue())
            raise
        command = Distribution({"name": "edge", "ext_modules": extensions}).get_command_obj("build_ext")
        command.build_lib, command.build_temp = f"{work}/lib", f"{work}/objects"
        command.ensure_finalized()
        command.run()
        os.sync()  # or, after a power cut, the name might be there and what is in the files might not
        Path(f"{work}/lib/gateway/edge").rename(target)


def main() -> None:
    os.umask(0o022)  # the edge's user reads what is made here
    with (Path(sys.prefix) / "lib" / f".{_PREFIX}lock").open("w") as lock:  # one at a time, or each would remove the other's work
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory().is_dir():
            print("setup: compiling the edge's data path", flush=True)
            build()
