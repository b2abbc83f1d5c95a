"""The announcement's base from its registry: the right architecture, byte by byte what its digest says, layers over each other."""

from __future__ import annotations

import gzip
import io
import platform
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from registry import Public, encrypted, running

from gateway.config import Images
from vmm import assets, base, making, registry
from vmm.kernel import AssetError

LAYER = "application/vnd.oci.image.layer.v1.tar"
OURS = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "amd64")


def layer(*members: tuple[str, bytes | str | None], mode: int = 0o644) -> bytes:
    """Files, links (of a text) and folders (None). A text that begins with = is a hard link's."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.mode = mode
            if data is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(data, str):
                member.type = tarfile.LNKTYPE if data.startswith("=") else tarfile.SYMTYPE
                member.linkname = data.removeprefix("=")
            else:
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data) if isinstance(data, bytes) else None)
    return out.getvalue()


def found(path: Path) -> dict[str, bytes | str | None]:
    with tarfile.open(path) as archive:
        files = {}
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            files[member.name] = file.read() if file is not None else member.linkname or None
        return files


@pytest.fixture
def public(tmp_path: Path) -> Iterator[tuple[Public, str, Path]]:
    """The registry, the name of its base, and whom to trust. Of another architecture there is another image."""
    one = Public()
    trusted = encrypted(one, tmp_path, "127.0.0.1")
    other = one.put_layers("lambda/microvms:other", [(LAYER, layer(("other", b"")))], "riscv64")
    lower = layer(("bin", None), ("bin/sh", b"shell"), ("etc", None), ("etc/release", b"old"), ("tmp/gone", b"x"))
    upper = layer(("etc/release", b"AL2023"), ("tmp/.wh.gone", b""))
    ours = one.put_layers(
        "lambda/microvms:ours", [(f"{LAYER}+gzip", gzip.compress(lower)), (f"{LAYER}+zstd", zstandard.compress(upper))], OURS
    )
    one.put_index("lambda/microvms:al2023-minimal", [other, ours])
    with running(one):
        yield one, f"{one.host}/lambda/microvms:al2023-minimal", trusted


def test_the_base_of_this_architecture_is_pulled(public: tuple[Public, str, Path], tmp_path: Path) -> None:
    one, name, trusted = public
    key = base.chosen_key("auto", name, "", lambda asked: registry.digest(asked, trusted))
    assert key.startswith(f"registry {name}@sha256:")
    base.make(tmp_path / "base.tar", key, trusted)
    assert found(tmp_path / "base.tar") == {"bin": None, "bin/sh": b"shell", "etc": None, "etc/release": b"AL2023"}
    assert one.refused and not one.tokens_seen_elsewhere and not list(tmp_path.glob("layer*"))


def test_the_set_up_pulls_it_and_the_doctor_names_it(public: tuple[Public, str, Path], tmp_path: Path) -> None:
    _, name, trusted = public
    cache = tmp_path / "cache"
    cache.mkdir()
    for step in assets._steps():  # all but the base is there
        if step.name != "base.tar":
            (cache / step.name).mkdir() if step.name in ("kernel", "guest", "qemu-root") else (cache / step.name).touch()
            making.key_path(cache / step.name).write_text(step.key(cache))
    wanted = assets.Base.of(Images(base="registry", base_names=[name], registry_ca=str(trusted)))
    assert [step for step, is_missing in assets.missing(cache, wanted).items() if is_missing] == ["base.tar"]
    said: list[str] = []
    assets.make(cache, said.append, wanted)
    assert len(said) == 1 and found(cache / "base.tar")["etc/release"] == b"AL2023" and not any(assets.missing(cache, wanted).values())
    assert base.described(making.key_at(cache / "base.tar")).startswith(f"{name}@sha256:")
    assets.make(cache, said.append, assets.Base.of(Images(base="auto", base_names=[name])))  # it stays, and nobody is asked
    assert len(said) == 1


def test_what_is_not_what_its_digest_says_is_refused(public: tuple[Public, str, Path], tmp_path: Path) -> None:
    one, name, trusted = public
    digest = registry.digest(name, trusted)
    for blob, data in one.blobs.items():
        one.blobs[blob] = data[:-1] + b"!"
    with pytest.raises(AssetError, match="sent something else for sha256:"):
        registry.pull(name, digest, tmp_path / "base.tar", trusted)
    one.manifests[f"lambda/microvms:{digest}"] += b" "
    with pytest.raises(AssetError, match="sent something else"):
        registry.digest(name, trusted)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("{host}/none:1", "404"), ("{host}/only:1", "has no image for linux"), ("127.0.0.1:1/x:1", "refused"), ("busybox", "names no registry"),
        ("{host}/lambda/microvms:al2023-minimal@sha256:" + "0" * 64, "404"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_had_is_said(public: tuple[Public, str, Path], name: str, text: str) -> None:
    one, _, trusted = public
    one.put_index("only:1", [])
    with pytest.raises(AssetError, match=text):
        registry.digest(name.format(host=one.host), trusted)


def test_nobody_is_believed_without_a_certificate(public: tuple[Public, str, Path]) -> None:
    with pytest.raises(AssetError, match="certificate"):
        registry.digest(public[1])


LOCAL, THERE = base.local_key(), "registry host/base:1@sha256:1"


@pytest.mark.parametrize(
    ("wanted", "there", "answers", "chosen"),
    [
        ("auto", "", True, "registry host/base:1@sha256:2"), ("auto", "", False, LOCAL), ("auto", LOCAL, True, LOCAL), ("auto", THERE, False, THERE),
        ("auto", "old", False, LOCAL), ("auto", "registry other@sha256:1", False, LOCAL), ("local", THERE, True, LOCAL), ("local", "", True, LOCAL),
        ("registry", LOCAL, True, "registry host/base:1@sha256:2"), ("registry", THERE, False, THERE), ("registry", LOCAL, False, None),
    ],
)  # fmt: skip
def test_which_base_is_made(wanted: str, there: str, answers: bool, chosen: str | None) -> None:
    def ask(name: str) -> str:
        if not answers:
            raise AssetError("no route")
        return "sha256:2"

    if chosen is None:
        with pytest.raises(AssetError, match="no route"):
            base.chosen_key(wanted, "host/base:1", there, ask)
    else:
        assert base.chosen_key(wanted, "host/base:1", there, ask) == chosen


@pytest.mark.parametrize(
    ("layers", "files"),
    [
        ([[("a", b"1")], [("a", b"2")]], {"a": b"2"}),
        ([[("d", None), ("d/a", b"1"), ("b", b"1")], [(".wh.d", b"")]], {"b": b"1"}),
        ([[("d", None), ("d/a", b"1")], [("d", None), ("d/.wh..wh..opq", b""), ("d/b", b"2")]], {"d": None, "d/b": b"2"}),
        ([[("d", None), ("d/a", b"1")], [("d", "elsewhere")]], {"d": "elsewhere"}),
        ([[("a", b"1"), ("b", "=a")], [("a", b"2")]], {"b": b"1", "a": b"2"}),
        ([[("a", b"1")], [("./.wh.a", b"")], [("./a", b"3")]], {"./a": b"3"}),
    ],
)
def test_layers_over_each_other(tmp_path: Path, layers: list[list[tuple[str, bytes | str | None]]], files: dict[str, object]) -> None:
    paths = []
    for number, members in enumerate(layers):
        paths.append(tmp_path / f"{number}.tar")
        paths[-1].write_bytes(layer(*members))
    registry.flatten(paths, tmp_path / "all.tar")
    assert found(tmp_path / "all.tar") == files


@pytest.mark.parametrize(
    ("uris", "kept"),
    [
        ("http://mirror.example.org/debian", True), ("https://mirror.example.com/debian", True), ("http://10.0.0.1/debian", False),
        ("http://mirror/debian", False), ("http://mirror.corp/debian", False), ("file:/srv/debian", False), ("http://localhost:3142/debian", False),
        ("http://mirror.example.org/debian http://[fd00::1]/debian", False),
    ],
)  # fmt: skip
def test_sources_that_a_microvm_reaches_stay_in_the_base(uris: str, kept: bool) -> None:
    text = f"Types: deb\n# of this host\nURIs: {uris}\nSuites: bookworm\nComponents: main\n"
    made = base.guest_sources(text)
    assert (uris in made and "#" not in made) if kept else not made
