"""WebSocket by the list of Autobahn's test suite, made anew with raw frames: each case is told to the application directly and
through the edge, and what comes back must be the same, to the frame.

Numbers and titles follow the suite's sections: 1 framing, 2 pings and pongs, 3 reserved bits, 4 opcodes, 5 fragmentation,
6 UTF-8, 7 closing, 9 limits, 10 automatic fragmentation, 12 compression.
"""

from __future__ import annotations

import socket
import ssl
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from service import Instance
from wire import get

pytestmark = [pytest.mark.vm, pytest.mark.conformance]
PORT = 8081
TEXT, BINARY, CLOSE, PING, PONG, CONT = 1, 2, 8, 9, 10, 0
Frames = list[bytes]


def frame(opcode: int, payload: bytes = b"", fin: bool = True, reserved: int = 0, mask: bytes = b"\x11\x22\x33\x44") -> bytes:
    size = len(payload)
    length = (
        bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big") if size < 65536 else b"\xff" + size.to_bytes(8, "big")
    )
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload)) if size < 70_000 else payload
    key = mask if size < 70_000 else bytes(4)
    return bytes([(0x80 if fin else 0) | reserved << 4 | opcode]) + length + key + masked


def close(code: int | None = 1000, reason: bytes = b"") -> bytes:
    return frame(CLOSE, b"" if code is None else code.to_bytes(2, "big") + reason)


def text(value: str | bytes, **options: Any) -> bytes:
    return frame(TEXT, value.encode() if isinstance(value, str) else value, **options)


def pieces(payload: bytes, size: int, opcode: int = BINARY) -> Frames:
    parts = [payload[at : at + size] for at in range(0, len(payload), size)]
    return [frame(opcode if not at else CONT, part, fin=at == len(parts) - 1) for at, part in enumerate(parts)]


GOOD_UTF8 = "Hello-µ@ßöäüàá-UTF-8!! κόσμε 𐍈"
BAD_UTF8 = {
    "6.3.1 surrogate in the middle": b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xed\xa0\x80edited", "6.4 above U+10FFFF": b"\xce\xba\xf4\x90\x80\x80edited",
    "6.8 first sequence too long": b"\xf8\x88\x80\x80\x80", "6.10 last sequence too long": b"\xfb\xbf\xbf\xbf\xbf", "6.12 lone 0x80": b"\x80", "6.12 lone 0xbf": b"\xbf",
    "6.12 two continuations": b"\x80\xbf", "6.13 first octets alone": b"\xc0 \xc1 \xc2 ", "6.14 last octet is missing": b"\xc0", "6.14 of three": b"\xe0\x80",
    "6.14 of four": b"\xf0\x80\x80", "6.16 impossible 0xfe": b"\xfe", "6.16 impossible 0xff": b"\xff", "6.17 overlong slash": b"\xc0\xaf", "6.17 overlong of three": b"\xe0\x80\xaf",
    "6.18 highest overlong": b"\xc1\xbf", "6.19 overlong NUL": b"\xc0\x80", "6.20 surrogate": b"\xed\xa0\x80", "6.20 last surrogate": b"\xed\xbf\xbf", "6.21 pair of surrogates": b"\xed\xa0\x80\xed\xb0\x80",
}  # fmt: skip

CASES: dict[str, Frames] = {"1.1.1 empty text": [text("")], "1.2.1 empty binary": [frame(BINARY)]}
for number, size in enumerate((125, 126, 127, 128, 65535, 65536), 2):
    CASES[f"1.1.{number} text of {size}"] = [text("*" * size)]
    CASES[f"1.2.{number} binary of {size}"] = [frame(BINARY, b"\xfe" * size)]
CASES |= {
    "2.1 ping without payload": [frame(PING)], "2.2 ping with text": [frame(PING, b"Hello, world!")], "2.3 ping with binary": [frame(PING, b"\x00\xff\xfe\xfd")],
    "2.4 ping of 125": [frame(PING, b"\xfe" * 125)], "2.5 ping of 126": [frame(PING, b"\xfe" * 126)], "2.6 ping of 125, an octet at a time": [frame(PING, b"\xfe" * 125)],
    "2.7 pong that nobody asked for": [frame(PONG)], "2.8 pong with payload": [frame(PONG, b"unsolicited")], "2.9 pong, then ping": [frame(PONG, b"x"), frame(PING, b"y")],
    "2.10 ten pings": [frame(PING, b"payload-%d" % n) for n in range(10)], "2.11 ten pings, an octet at a time": [frame(PING, b"payload-%d" % n) for n in range(10)],
    "3.1 reserved bits 1": [text("small", reserved=1)], "3.2 message, reserved bits 2": [text("small"), text("again", reserved=2), frame(PING)],
    "3.3 message, reserved bits 3": [text("small"), text("again", reserved=3), frame(PING)], "3.4 message, reserved bits 4": [text("small"), text("again", reserved=4), frame(PING)],
    "3.5 binary, reserved bits 5": [frame(BINARY, b"x", reserved=5)], "3.6 ping, reserved bits 6": [frame(PING, b"x", reserved=6)], "3.7 close, reserved bits 7": [frame(CLOSE, b"", reserved=7)],
}  # fmt: skip
for number, opcode in enumerate((3, 4, 5, 6, 7, 11, 12, 13, 14, 15)):
    CASES[f"4.{1 + number // 5}.{1 + number % 5} opcode {opcode}"] = [text("before"), frame(opcode, b"x" * (number % 3)), frame(PING)]
CASES |= {
    "5.1 ping in two": [frame(PING, b"a", fin=False), frame(CONT, b"b")], "5.2 pong in two": [frame(PONG, b"a", fin=False), frame(CONT, b"b")],
    "5.3 text in two": [text("frag", fin=False), frame(CONT, b"ment")], "5.4 text in two, octets": [text("frag", fin=False), frame(CONT, b"ment")],
    "5.6 ping between": [text("a", fin=False), frame(PING, b"p"), frame(CONT, b"b")], "5.9 continuation of nothing": [frame(CONT, b"x"), text("y")],
    "5.10 continuation of nothing, then text": [frame(CONT, b"x", fin=True), text("Hello")], "5.12 open continuation of nothing": [frame(CONT, b"x", fin=False), text("y")],
    "5.15 after an end": [text("a", fin=False), frame(CONT, b"b"), frame(CONT, b"c", fin=False), text("d")],
    "5.16 twice: open continuation, text, continuation": [frame(CONT, b"a", fin=False), text("b", fin=False), frame(CONT, b"c")] * 2,
    "5.18 text in text": [text("a", fin=False), text("b")],
    "5.19 pings between five pieces": [text("1", fin=False), frame(CONT, b"2", fin=False), frame(PING, b"p1"), frame(CONT, b"3", fin=False), frame(CONT, b"4", fin=False), frame(PING, b"p2"), frame(CONT, b"5")],
    "6.1.1 empty": [text("")], "6.1.2 three empty pieces": [text("", fin=False), frame(CONT, fin=False), frame(CONT)],
    "6.1.3 middle has something": [text("", fin=False), frame(CONT, b"middle", fin=False), frame(CONT)], "6.2.1 valid": [text(GOOD_UTF8)],
    "6.2.2 valid, cut between code points": [text("Hello-µ@ßöä", fin=False), frame(CONT, "üàá-UTF-8!!".encode())], "6.2.3 valid, octet by octet": pieces(GOOD_UTF8.encode(), 1, TEXT),
    "6.5 highest code point": [text("\U0010ffff")], "6.6 one octet": [text(b"\x7f")], "6.7 first of each length": [text("\x00"), text("\x80"), text("\u0800"), text("\U00010000")],
    "6.9 last of each length": [text("\x7f"), text("\u07ff"), text("\uffff"), text("\U0010ffff")], "6.11 around surrogates": [text("\ud7ff"), text("\ue000"), text("\ufffd")],
    "6.22 non-characters": [text("\ufffe"), text("\uffff"), text("\U0001fffe")], "6.23 replacement characters": [text("\ufff9\ufffa\ufffb\ufffc\ufffd")],
}  # fmt: skip
CASES |= {name: [text(payload)] for name, payload in BAD_UTF8.items()}
CASES |= {f"{name}, in pieces": pieces(payload, 1, TEXT) for name, payload in BAD_UTF8.items() if len(payload) > 1}
CASES |= {
    "7.1.1 message, then close": [text("Hello World!"), close()], "7.1.2 two closes": [close(), close()], "7.1.3 ping after close": [close(), frame(PING)],
    "7.1.4 text after close": [close(), text("late")], "7.1.5 close within a message": [text("a", fin=False), close(), frame(CONT, b"b")],
    "7.3.1 close without code": [close(None)], "7.3.2 close of one octet": [frame(CLOSE, b"a")], "7.3.3 close with code": [close(1000)], "7.3.4 with reason": [close(1000, b"Hello World!")],
    "7.3.5 reason of 123": [close(1000, b"*" * 123)], "7.3.6 reason of 124": [close(1000, b"*" * 124)], "7.5.1 reason that is not UTF-8": [close(1000, b"\xce\xba\xe1\xbd\xb9\xed\xa0\x80")],
}  # fmt: skip
for number, code in enumerate((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999), 1):
    CASES[f"7.7.{number} code {code}"] = [close(code)]
for number, code in enumerate((0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999), 1):
    CASES[f"7.9.{number} code {code}"] = [close(code)]
CASES |= {"7.13.1 code 5000": [close(5000)], "7.13.2 code 65535": [close(65535)]}
for number, size in enumerate((65536, 262144, 1048576, 4194304), 1):
    CASES[f"9.1.{number} text of {size}"] = [text(b"*" * size)]
    CASES[f"9.2.{number} binary of {size}"] = [frame(BINARY, b"\xfe" * size)]
for number, size in enumerate((256, 1024, 4096, 16384, 65536), 1):
    CASES[f"9.4.{number} 1 MiB in pieces of {size}"] = pieces(b"*" * 1048576, size)
    CASES[f"9.7.{number} 200 messages of {size // 16}"] = [text("*" * (size // 16))] * 200
CASES["10.1.1 65536 in pieces of 1300"] = pieces(b"*" * 65536, 1300, TEXT)

OCTETS = {"2.6", "2.11", "5.4"}  # written an octet at a time
COMPRESSED = {f"12.1.{n} compressed message of {size}": size for n, size in enumerate((0, 16, 64, 1024, 16384, 131072), 1)}
END = b"the end of the case"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="


def direct(service: Instance, guest: dict[str, Any]) -> socket.socket:
    return service.inside(guest["microvmId"], lambda: socket.create_connection(("169.254.77.2", PORT), 10))


def through(guest: dict[str, Any]) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=guest["ca"])
    return context.wrap_socket(socket.create_connection(("127.0.0.1", guest["port"]), 10), server_hostname=guest["host"])


def conversation(
    sock: socket.socket, guest: dict[str, Any], frames: Frames, octets: bool, extension: str = "", answers: int = 0
) -> list[tuple[int, bytes]]:
    """Frames that came back: the close that ends every case, or what there was before the end."""
    head = f"GET / HTTP/1.1\r\nHost: {guest['endpoint']}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n{extension}"
    if isinstance(sock, ssl.SSLSocket):
        head += f"X-aws-proxy-auth: {guest['token']}\r\nX-aws-proxy-port: {PORT}\r\n"
    with sock:
        sock.sendall(head.encode() + b"\r\n")
        file = sock.makefile("rb")
        status = file.readline()
        assert b" 101 " in status, status
        while file.readline().strip():
            pass
        # A case that does not close ends with a message whose echo says that everything before it has been answered.
        closes = any(one[0] & 15 == CLOSE for one in frames)
        whole = b"".join(frames) + (b"" if closes or answers else text(END))
        got: list[tuple[int, bytes]] = []
        try:
            for at in range(len(whole)) if octets else ():
                sock.sendall(whole[at : at + 1])
            if not octets:
                sock.sendall(whole)
        except OSError:
            pass  # it has closed already, and said so
        for one in read_frames(file):
            got.append(one)
            if not closes and (one == (0x80 | TEXT, END) or len(got) == answers):
                sock.sendall(close())
        return got


def read_frames(file: Any) -> Iterator[tuple[int, bytes]]:
    """Until a close frame, or the end."""
    try:
        while len(head := file.read(2)) == 2:
            size = head[1] & 127
            if size > 125:
                size = int.from_bytes(file.read(2 if size == 126 else 8), "big")
            yield head[0], file.read(size)
            if head[0] & 15 == CLOSE:
                return
    except OSError:
        return


@pytest.mark.parametrize("name", CASES)
def test_case(service: Instance, guest: dict[str, Any], name: str) -> None:
    if not service.hypervisors().get(guest["microvmId"]):
        assert get(guest["endpoint"], guest["ca"], guest["token"], "/state").status == 200
    octets = name.split(" ", maxsplit=1)[0] in OCTETS
    expected = conversation(direct(service, guest), guest, CASES[name], octets)
    assert expected, "the application said nothing"
    if name.startswith(("1.", "5.3", "6.2.", "9.")):
        assert (0x80 | TEXT, END) in expected, expected[:3]  # these are answered, not refused
    assert conversation(through(guest), guest, CASES[name], octets) == expected


@pytest.mark.parametrize("name", COMPRESSED)
def test_compression_passes(service: Instance, guest: dict[str, Any], name: str) -> None:
    packer = zlib.compressobj(wbits=-15)
    payload = packer.compress(b"torpor " * (COMPRESSED[name] // 7)) + packer.flush(zlib.Z_SYNC_FLUSH)
    frames = [frame(TEXT, payload[:-4] or b"\x00", reserved=4)] * 3
    extension = "Sec-WebSocket-Extensions: permessage-deflate; client_no_context_takeover; server_no_context_takeover\r\n"
    expected = conversation(direct(service, guest), guest, frames, False, extension, 3)
    assert any(first & 0x40 for first, _ in expected)
    assert conversation(through(guest), guest, frames, False, extension, 3) == expected
