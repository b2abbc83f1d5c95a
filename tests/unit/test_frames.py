"""HTTP/2's frames as octets (RFC 9113, 4 and 6), and the field codec beside another implementation (RFC 7541)."""

from __future__ import annotations

import hpack
import pytest
from hyperframe import frame as other
from hypothesis import given
from hypothesis import strategies as st

from gateway.edge.wire import http2_frames as f

FIELDS = st.lists(st.tuples(st.binary(min_size=1, max_size=200), st.binary(max_size=300)), max_size=20)


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**31 - 1), st.binary(max_size=70_000))
def test_a_frames_head(kind: int, flags: int, number: int, payload: bytes) -> None:
    made = f.frame(kind, flags, number, payload)
    assert made == len(payload).to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big") + payload


def read(data: bytes) -> other.Frame:
    found, length = other.Frame.parse_frame_header(memoryview(data[:9]))
    found.parse_body(memoryview(data[9:]))
    assert len(data) == 9 + length
    return found


def test_frames_as_another_implementation_reads_them() -> None:
    settings = read(f.settings({f.MAX_CONCURRENT_STREAMS: 128, f.ENABLE_CONNECT_PROTOCOL: 1}))
    assert isinstance(settings, other.SettingsFrame) and settings.settings == {3: 128, 8: 1}
    update = read(f.window_update(7, 1 << 20))
    assert isinstance(update, other.WindowUpdateFrame) and (update.stream_id, update.window_increment) == (7, 1 << 20)
    reset = read(f.rst_stream(5, f.Code.CANCEL))
    assert isinstance(reset, other.RstStreamFrame) and (reset.stream_id, reset.error_code) == (5, 8)
    goaway = read(f.goaway(9, f.Code.ENHANCE_YOUR_CALM, "why"))
    assert isinstance(goaway, other.GoAwayFrame) and (goaway.last_stream_id, goaway.error_code, goaway.additional_data) == (9, 11, b"why")


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("size", [0, 1, f.FRAME_BYTES, f.FRAME_BYTES + 1, 3 * f.FRAME_BYTES, 3 * f.FRAME_BYTES + 1])
def test_a_field_block_of_any_length(size: int, end: bool) -> None:
    block, data, pieces = (
        bytes(number & 255 for number in range(size)),
        f.headers(3, bytes(number & 255 for number in range(size)), end),
        [],
    )
    while data:
        length = int.from_bytes(data[:3], "big")
        assert length <= f.FRAME_BYTES
        pieces.append((data[3], data[4], data[9 : 9 + length]))
        data = data[9 + length :]
    assert b"".join(payload for _, _, payload in pieces) == block
    assert [kind for kind, _, _ in pieces] == [f.HEADERS] + [f.CONTINUATION] * (len(pieces) - 1)
    assert [bool(flags & f.END_HEADERS) for _, flags, _ in pieces] == [False] * (len(pieces) - 1) + [True]
    assert bool(pieces[0][1] & f.END_STREAM) is end and not any(flags & f.END_STREAM for _, flags, _ in pieces[1:])


@given(FIELDS)
def test_what_is_encoded_reads_the_same_elsewhere_and_leaves_no_table(fields: list[tuple[bytes, bytes]]) -> None:
    block = f.encode(fields)
    decoder = hpack.Decoder(max_header_list_size=1 << 20)
    for _ in range(2):
        assert [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)] == fields
    assert [(name, value) for name, value, _ in f.decode(f.new_decoder(1 << 20), block)] == fields


@given(st.lists(FIELDS, max_size=5), st.booleans())
def test_what_another_implementation_encodes_is_read_with_its_table(blocks: list[list[tuple[bytes, bytes]]], huffman: bool) -> None:
    encoder, decoder = hpack.Encoder(), f.new_decoder(1 << 20)
    for fields in blocks:
        assert [(name, value) for name, value, _ in f.decode(decoder, encoder.encode(fields, huffman=huffman))] == fields


@pytest.mark.parametrize("status", [100, 103, 200, 204, 206, 304, 400, 401, 404, 429, 500, 502, 599])
def test_a_status(status: int) -> None:
    assert hpack.Decoder().decode(f.encode_status(status), raw=True) == [(b":status", b"%d" % status)]


@pytest.mark.parametrize(
    ("block", "code"),
    [
        (b"\xff\xff\xff\xff\xff", f.Code.COMPRESSION_ERROR),
        (b"\x80", f.Code.COMPRESSION_ERROR),
        (b"\xbe", f.Code.COMPRESSION_ERROR),
        (b"\x00\x05ab", f.Code.COMPRESSION_ERROR),
        (b"\x3f\xff\xff\xff\xff\x0f", f.Code.COMPRESSION_ERROR),
        (f.encode([(b"x", b"y" * 2000)]), f.Code.ENHANCE_YOUR_CALM),
    ],
)
def test_a_block_that_cannot_be_read_ends_the_connection(block: bytes, code: f.Code) -> None:
    with pytest.raises(f.H2ConnectionError) as refused:
        f.decode(f.new_decoder(1000), block)
    assert refused.value.code == code
