"""gRPC's interop test names with grpcio's own client and server, through the edge (X-aws-proxy-force-h2 as metadata)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from service import Instance

pytestmark = [pytest.mark.vm, pytest.mark.conformance]
SERVICE = "/grpc.testing.TestService/"
LARGE, ANSWER = 271_828, 314_159


class Stub:
    def __init__(self, guest: dict[str, Any]) -> None:
        credentials = grpc.ssl_channel_credentials(Path(guest["ca"]).read_bytes())
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.ssl_target_name_override", guest["host"]),
            ("grpc.default_authority", guest["endpoint"]),
        ]
        self.channel = grpc.secure_channel(f"127.0.0.1:{guest['port']}", credentials, options)
        self.metadata = (("x-aws-proxy-auth", guest["token"]), ("x-aws-proxy-port", "50051"), ("x-aws-proxy-force-h2", "true"))

    def unary(
        self, request: bytes, method: str = "UnaryCall", service: str = SERVICE, more: tuple[tuple[str, Any], ...] = (), **options: Any
    ) -> Any:
        return self.channel.unary_unary(service + method).with_call(
            request, metadata=self.metadata + more, timeout=options.pop("timeout", 30), **options
        )

    def call(self, kind: str, method: str, request: Any, timeout: float = 30) -> Any:
        return getattr(self.channel, kind)(SERVICE + method)(request, metadata=self.metadata, timeout=timeout)


@pytest.fixture
def stub(guest: dict[str, Any], state: str) -> Iterator[Stub]:
    one = Stub(guest)
    yield one
    one.channel.close()


def status_of(work: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        work()
    return raised.value.code(), raised.value.details()


def test_empty_unary(stub: Stub) -> None:
    answer, call = stub.unary(b"", "EmptyCall")
    assert answer == b"" and call.code() is grpc.StatusCode.OK


def test_large_unary(stub: Stub) -> None:
    assert stub.unary(b"x" * LARGE)[0] == b"x" * LARGE


def test_client_compressed_unary(stub: Stub) -> None:
    assert stub.unary(b"x" * LARGE, compression=grpc.Compression.Gzip)[0] == b"x" * LARGE


def test_client_streaming(stub: Stub) -> None:
    sizes = [27182, 8, 1828, 45904]
    assert int(stub.call("stream_unary", "StreamingInputCall", iter([b"x" * size for size in sizes]))) == sum(sizes)


def test_server_streaming(stub: Stub) -> None:
    sizes = [31415, 9, 2653, 58979]
    answers = stub.call("unary_stream", "StreamingOutputCall", ",".join(map(str, sizes)).encode())
    assert [len(one) for one in answers] == sizes


def test_ping_pong(stub: Stub) -> None:
    """Each request waits for the answer to the one before: nothing may be kept back."""
    turn = threading.Semaphore(1)

    def requests() -> Iterator[bytes]:
        for size in (27182, 8, 1828, 45904):
            assert turn.acquire(timeout=20)
            yield b"x" * size

    seen = []
    for answer in stub.call("stream_stream", "FullDuplexCall", requests()):
        seen.append(len(answer))
        turn.release()
    assert seen == [27182, 8, 1828, 45904]


def test_ping_pong_with_sleep_between(service: Instance, guest: dict[str, Any]) -> None:
    """Ours: a silent stream is parked when its microVM falls asleep, and its next message wakes it: same call, same server."""
    one, turns = Stub(guest), threading.Semaphore(1)

    def requests() -> Iterator[bytes]:
        for size in (10, 20_000, 30):
            assert turns.acquire(timeout=60)
            yield b"x" * size

    seen = []
    for answer in one.call("stream_stream", "FullDuplexCall", requests(), timeout=120):
        seen.append(len(answer))
        if len(seen) < 3:
            service.client().suspend_microvm(microvmIdentifier=guest["microvmId"])
            service.state(guest["microvmId"], "SUSPENDED")
        turns.release()
    assert seen == [10, 20_000, 30]
    one.channel.close()


def test_empty_stream(stub: Stub) -> None:
    assert list(stub.call("stream_stream", "FullDuplexCall", iter([]))) == []


def test_custom_metadata(stub: Stub) -> None:
    more = (("x-grpc-test-echo-initial", "test_initial_metadata_value"), ("x-grpc-test-echo-trailing-bin", b"\xab\xab\xab"))
    _, call = stub.unary(b"hello", more=more)
    assert ("x-grpc-test-echo-initial", "test_initial_metadata_value") in [tuple(one) for one in call.initial_metadata()]
    assert ("x-grpc-test-echo-trailing-bin", b"\xab\xab\xab") in [tuple(one) for one in call.trailing_metadata()]


def test_status_code_and_message(stub: Stub) -> None:
    assert status_of(lambda: stub.unary(b"status 2 test status message")) == (grpc.StatusCode.UNKNOWN, "test status message")
    assert status_of(lambda: list(stub.call("stream_stream", "FullDuplexCall", iter([b"status 2"])))) == (
        grpc.StatusCode.UNKNOWN,
        "asked for",
    )


def test_special_status_message(stub: Stub) -> None:
    message = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"
    assert status_of(lambda: stub.unary(b"status 2 " + message.encode())) == (grpc.StatusCode.UNKNOWN, message)


def test_unimplemented_method(stub: Stub) -> None:
    assert status_of(lambda: stub.unary(b"", "UnimplementedCall"))[0] is grpc.StatusCode.UNIMPLEMENTED


def test_unimplemented_service(stub: Stub) -> None:
    assert status_of(lambda: stub.unary(b"", "EmptyCall", "/grpc.testing.UnimplementedService/"))[0] is grpc.StatusCode.UNIMPLEMENTED


def test_timeout_on_sleeping_server(stub: Stub) -> None:
    stub.unary(b"", "EmptyCall")  # the wake-up is not part of the deadline here
    assert status_of(lambda: stub.unary(b"sleep 5", timeout=0.3))[0] is grpc.StatusCode.DEADLINE_EXCEEDED


def test_cancel_after_begin(stub: Stub) -> None:
    call = stub.channel.stream_unary(SERVICE + "StreamingInputCall").future(_never(), metadata=stub.metadata)
    call.cancel()
    assert call.code() is grpc.StatusCode.CANCELLED


def test_cancel_after_first_response(stub: Stub) -> None:
    call = stub.channel.stream_stream(SERVICE + "FullDuplexCall")(_first_then_never(b"x" * 100), metadata=stub.metadata, timeout=30)
    assert next(call) == b"x" * 100
    call.cancel()
    assert call.code() is grpc.StatusCode.CANCELLED


def test_without_a_token_is_a_bare_403(guest: dict[str, Any], stub: Stub) -> None:
    stub.metadata = (("x-aws-proxy-port", "50051"), ("x-aws-proxy-force-h2", "true"))
    code, details = status_of(lambda: stub.unary(b""))
    assert code is grpc.StatusCode.PERMISSION_DENIED and "403" in details


def test_many_calls_at_once(stub: Stub) -> None:
    call = stub.channel.unary_unary(SERVICE + "UnaryCall")
    futures = [call.future(b"%d" % n, metadata=stub.metadata, timeout=60) for n in range(300)]
    assert [future.result() for future in futures] == [b"%d" % n for n in range(300)]


def _never() -> Iterator[bytes]:
    time.sleep(0.5)  # the application's own silence
    yield b""


def _first_then_never(first: bytes) -> Iterator[bytes]:
    yield first
    time.sleep(0.5)
