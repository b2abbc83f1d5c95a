"""Trees of files as they can be compared: of layers as `docker save` writes them (OCI image-spec, layer.md), and of a directory.

A tree maps a path to what is there: type, mode, owner, time, content, extended attributes. A time after `since` is "built": no two builds
take place at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
import tarfile
from pathlib import Path
from typing import Any

Tree = dict[str, dict[str, Any]]
_XATTR = "SCHILY.xattr."
_DEVICES = {tarfile.CHRTYPE: "character device", tarfile.BLKTYPE: "block device"}


def _time(seconds: float, since: float) -> int | str:
    return "built" if seconds >= since - 1 else int(seconds)


def of_image(archive: tarfile.TarFile, image: str, since: float) -> tuple[Tree, dict[str, Any]]:
    """The tree and the configuration of an image in an archive of `docker save`."""

    def member(name: str) -> Any:
        found = archive.extractfile(name)
        assert found is not None, name
        return found

    entry = next(one for one in json.load(member("manifest.json")) if f"{image}:latest" in (one["RepoTags"] or ()))
    tree: Tree = {}
    for layer in entry["Layers"]:
        with tarfile.open(fileobj=member(layer)) as files:
            _apply(tree, files, since)
    return tree, json.load(member(entry["Config"]))["config"]


def _apply(tree: Tree, layer: tarfile.TarFile, since: float) -> None:
    fresh: Tree = {}  # a layer's whiteouts concern the layers below it only
    for one in layer:
        path = os.path.normpath(f"/{one.name}")
        folder, name = os.path.split(path)
        if name == ".wh..wh..opq":
            _remove(tree, folder, itself=False)
        elif name.startswith(".wh."):
            _remove(tree, os.path.join(folder, name[4:]))
        elif one.islnk():
            target = os.path.normpath(f"/{one.linkname}")
            fresh[path] = fresh[target]  # the same dictionary, as it is the same file
        else:
            fresh[path] = _entry(layer, one, since)
    for path, entry in fresh.items():
        if entry["type"] != "directory":
            _remove(tree, path)
        tree[path] = entry


def _remove(tree: Tree, path: str, itself: bool = True) -> None:
    if itself:
        tree.pop(path, None)
    for below in [one for one in tree if one.startswith(f"{path.rstrip('/')}/")]:
        del tree[below]


def _entry(layer: tarfile.TarFile, one: tarfile.TarInfo, since: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"mode": f"{one.mode & 0o7777:o}", "owner": f"{one.uid}:{one.gid}", "time": _time(one.mtime, since)}
    attributes = {name.removeprefix(_XATTR): _bytes(value) for name, value in one.pax_headers.items() if name.startswith(_XATTR)}
    if attributes:
        entry["attributes"] = attributes
    if one.isdir():
        return entry | {"type": "directory"}
    if one.issym():
        return entry | {"type": "link", "target": one.linkname}
    if one.type in _DEVICES:
        return entry | {"type": _DEVICES[one.type], "device": f"{one.devmajor}:{one.devminor}"}
    if one.isfifo():
        return entry | {"type": "pipe"}
    content = layer.extractfile(one)
    assert content is not None, one.name
    return entry | {"type": "file", "content": hashlib.file_digest(content, "sha256").hexdigest()}  # type: ignore[arg-type]


def _bytes(value: str) -> str:
    return value.encode("utf-8", "surrogateescape").hex()


def of_directory(root: Path, since: float) -> Tree:
    tree: Tree = {}
    known: dict[int, dict[str, Any]] = {}

    def add(path: str) -> None:
        found = os.lstat(path)
        shown = os.path.normpath(f"/{os.path.relpath(path, root)}")
        if stat.S_ISDIR(found.st_mode) or found.st_nlink == 1 or found.st_ino not in known:
            known[found.st_ino] = _of_file(path, found, since)
        tree[shown] = known[found.st_ino]

    add(str(root))
    for directory, folders, files in os.walk(root):
        for name in [*folders, *files]:
            add(os.path.join(directory, name))
    return tree


def _of_file(path: str, found: os.stat_result, since: float) -> dict[str, Any]:
    mode = found.st_mode
    entry: dict[str, Any] = {"mode": f"{mode & 0o7777:o}", "owner": f"{found.st_uid}:{found.st_gid}", "time": _time(found.st_mtime, since)}
    attributes = {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in os.listxattr(path, follow_symlinks=False)}
    if attributes:
        entry["attributes"] = attributes
    if stat.S_ISDIR(mode):
        return entry | {"type": "directory"}
    if stat.S_ISLNK(mode):
        return entry | {"type": "link", "target": os.readlink(path)}
    if stat.S_ISFIFO(mode):
        return entry | {"type": "pipe"}
    if not stat.S_ISREG(mode):
        kind = "character device" if stat.S_ISCHR(mode) else "block device"
        return entry | {"type": kind, "device": f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"}
    with open(path, "rb") as content:
        return entry | {"type": "file", "content": hashlib.file_digest(content, "sha256").hexdigest()}


def with_hard_links(tree: Tree) -> Tree:
    """Each entry with the paths that are the same file; an entry that is one file has one dictionary."""
    paths: dict[int, list[str]] = {}
    for path, entry in sorted(tree.items()):
        paths.setdefault(id(entry), []).append(path)
    return {path: entry | ({"same file": same} if len(same := paths[id(entry)]) > 1 else {}) for path, entry in tree.items()}


if __name__ == "__main__":
    json.dump(with_hard_links(of_directory(Path(sys.argv[1]), float(sys.argv[2]))), sys.stdout)
