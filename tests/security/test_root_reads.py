"""The wall around what root reads and prints of others' making: no link in control's directory, no id of somebody else's, no escape sequence.

Each is taken away by name: O_NOFOLLOW, the look at the host's ids (instance.check_ids), the line that is printed (output.line_of).
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway import backup, files, instance
from gateway.accounts.directory import Directory, DirectoryError
from gateway.cli import images, microvms
from gateway.cli.output import line_of
from gateway.config import ConfigError, Settings
from gateway.sessions.store import Store

# ---- links in control's directory ----


def planted(directory: Path) -> tuple[Path, Path]:
    """A secret of root's, and what control puts in the place of its own file."""
    secret = directory / "shadow.json"
    secret.write_text('{"root": "secret"}')
    secret.chmod(0o600)
    (directory / "control").mkdir()
    link = directory / "control/access-keys.json"
    link.symlink_to(secret)
    return secret, link


def test_keys_are_read_from_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, link = planted(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        files.access_keys(link)
    monkeypatch.setattr(os, "O_NOFOLLOW", 0)
    assert files.access_keys(link) == {"root": "secret"}, "the attack, without the wall"


def test_a_pipe_in_a_keys_place_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key")
    with pytest.raises(OSError, match="no plain file"):
        files.read(tmp_path / "key")


def test_a_backup_takes_nothing_that_a_link_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be control's own after a restore."""
    _, link = planted(tmp_path)
    with pytest.raises(backup.BackupError, match="is a link"):
        backup._copy(link, tmp_path / "backup/access-keys.json")
    assert not (tmp_path / "backup/access-keys.json").exists()
    monkeypatch.setattr(os, "O_NOFOLLOW", 0)
    backup._copy(link, tmp_path / "backup/access-keys.json")
    assert (tmp_path / "backup/access-keys.json").read_text() == '{"root": "secret"}'


def test_what_is_no_link_is_copied_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "keys.json"
    source.write_text("[]")
    source.chmod(0o640)
    os.utime(source, ns=(1, 10**18))
    if os.geteuid() == 0:
        os.chown(source, 640_001, 640_001)
    backup._copy(source, tmp_path / "b/keys.json")
    made, was = (tmp_path / "b/keys.json").stat(), source.stat()
    assert (made.st_uid, made.st_gid, made.st_mode, made.st_mtime_ns) == (was.st_uid, was.st_gid, was.st_mode, was.st_mtime_ns)
    assert (tmp_path / "b/keys.json").read_text() == "[]"


# ---- ids ----


@pytest.mark.parametrize(
    ("file", "line", "setting"),
    [
        ("subuid", "alice:624288:65536", "users.first"), ("subgid", "alice:640001:1", "users.first"), ("passwd", "bob:x:640000:100::/:/bin/sh", "users.first"),
        ("group", "staff:x:836607:", "users.first"), ("subuid", f"alice:{(1 << 30) + 5}:65536", "users.builders"),
    ],
)  # fmt: skip
def test_whoever_has_an_id_of_ours_keeps_the_service_from_starting(tmp_path: Path, file: str, line: str, setting: str) -> None:
    """Who may take it in a user namespace is that process to all others (SO_PEERCRED), and control to vmm."""
    settings = Settings(root=tmp_path)
    (tmp_path / file).write_text(f"# a comment\nroot:100000:65536\nroot:x:0:0::/:/bin/sh\n{line}\n")
    with pytest.raises(ConfigError, match=setting):
        instance.check_ids(settings, tmp_path)


def test_ids_beside_ours_are_anybodys(tmp_path: Path) -> None:
    (tmp_path / "subuid").write_text(f"a:100000:65536\nb:574464:65536\nc:{640_000 + instance.IDS}:65536\nd:1000:0\n:\nbroken\n")
    (tmp_path / "passwd").write_text("nobody:x:65534:65534::/:/bin/sh\nx\n")
    instance.check_ids(Settings(root=tmp_path), tmp_path)
    instance.check_ids(Settings(root=tmp_path), tmp_path / "nothing")


@pytest.mark.skipif(os.geteuid() != 0, reason="takes somebody else's id")
def test_an_id_in_a_user_namespace_is_that_user_to_everybody_else() -> None:
    """The attack as such: root of a user namespace, to which our id is mapped, is that id at a socket's other end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = [
            "unshare",
            "--user",
            "--map-root-user",
            "/usr/bin/python3",  # which every user may start
            "-S",
            "-c",
            "import os, sys; os.write(int(sys.argv[1]), b'%d' % os.getuid())",
        ]
        user = ["setpriv", "--reuid=640001", "--regid=640001", "--clear-groups"]
        subprocess.run([*user, *words, str(theirs.fileno())], check=True, timeout=30, pass_fds=[theirs.fileno()])
        assert ours.recv(99) == b"0", "itself it is root"
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        words[-1] = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).send(b'x')"
        subprocess.run([*user, *words, str(theirs.fileno())], check=True, timeout=30, pass_fds=[theirs.fileno()])
        _, ((_, _, credentials),), _, _ = ours.recvmsg(9, 99)
        assert struct.unpack("3i", credentials)[1] == 640_001


# ---- numbers of accounts that were ----


async def test_an_account_gets_no_number_whose_logs_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    await store.open()
    try:
        directory = Directory(store, "111111111111", {}, b"seal")
        directory.remains = lambda account: account == "222222222222"
        with pytest.raises(DirectoryError, match="its logs are kept"):
            await directory.create_account("next", "222222222222")
        assert (await directory.create_account("next", "333333333333")).id == "333333333333"
        directory.remains = lambda account: False
        assert (await directory.create_account("again", "222222222222")).id == "222222222222", "the attack: the logs would be its own"
    finally:
        await store.close()


# ---- terminals ----

ATTACKS = {
    "clipboard (OSC 52)": "\x1b]52;c;cm0gLXJmIH4=\x07", "title (OSC 0)": "\x1b]0;title\x1b\\", "device control (DCS)": "\x1bP$q\"p\x1b\\",
    "C1 control": "\x9b31m\x9d0;x\x9c", "overwritten line": "all is well\rBUILD FAILED", "backspaces": "safe\b\b\b\brm -rf", "bidirectional": "a\u202eb",
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_terminal_obeys_no_guest(attack: str) -> None:
    shown = line_of(ATTACKS[attack])
    assert shown.isprintable() and not ATTACKS[attack].isprintable()


def test_text_is_text() -> None:
    assert line_of("caf\u00e9\t\u65e5\u672c \U0001f600 [x]") == "caf\u00e9\t\u65e5\u672c \U0001f600 [x]"


def test_every_line_of_a_guest_is_printed_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`torpor logs`, of a microVM and of a build."""
    evil = ATTACKS["clipboard (OSC 52)"]
    events = {"events": [{"message": evil, "timestamp": 1}], "nextForwardToken": "f/1"}

    class Reader:
        def __init__(self) -> None:
            self.pages = [events, {"events": [], "nextForwardToken": "f/1"}]

        def get_log_events(self, **_: Any) -> Any:
            return self.pages.pop(0)

    reader = Reader()
    vm = {"imageArn": "a:b:image", "imageVersion": "1.0", "startedAt": SimpleNamespace(timestamp=lambda: 1.0), "executionRoleArn": "r"}
    monkeypatch.setattr(microvms, "find", lambda name: None)
    monkeypatch.setattr(microvms, "client", lambda *_: SimpleNamespace(get_microvm=lambda **_: vm))
    monkeypatch.setattr(microvms, "session", lambda: SimpleNamespace(client=lambda _: reader))
    monkeypatch.setattr(microvms, "resolve", lambda name: name)
    monkeypatch.setattr(microvms, "microvm_log", lambda name, after: None)
    microvms.logs("microvm-1")
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr(microvms, "line_of", lambda text: text)
    reader.pages = [events, {"events": [], "nextForwardToken": "f/1"}]
    microvms.logs("microvm-1")
    assert evil in capsys.readouterr().out, "the attack, without the wall"
    assert images.line_of is line_of


# ---- tokens in a list of processes ----


def test_curl_gets_its_token_where_nobody_else_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ps` shows everybody every command: the token opens the microVM for five minutes."""
    seen: list[list[str]] = []
    monkeypatch.setattr(microvms, "resolve", lambda name: name)
    monkeypatch.setattr(microvms, "bundle", lambda: "/ca")
    monkeypatch.setattr(microvms, "client", lambda *_: SimpleNamespace(get_microvm=lambda **_: {"endpoint": "h"}))
    monkeypatch.setattr(microvms, "_mint", lambda *_: {"X-aws-proxy-auth": "very-secret"})
    monkeypatch.setattr(os, "execvp", lambda _, command: seen.append(command))
    microvms.curl(SimpleNamespace(args=["-i"]), "microvm-1", "/", 8080)  # type: ignore[arg-type]
    (command,) = seen
    assert not any("very-secret" in word for word in command)
    file = next(word for word in command if word.startswith("@"))[1:]
    assert Path(file).read_text() == "X-aws-proxy-auth: very-secret\n"
    number = int(file.rpartition("/")[2])
    assert os.get_inheritable(number)
    os.close(number)
