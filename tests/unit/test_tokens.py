"""Access tokens: what is minted is verified, and nothing else is."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from gateway import tokens
from gateway.tokens import LONGEST_SECONDS, ROTATE_SECONDS, Checker, Grant, MalformedToken, Minter, TokenError, merge

NOW = 1_800_000_000.0
PORTS = st.integers(1, 65535)
RANGES = st.lists(st.tuples(PORTS, PORTS).map(lambda pair: (min(pair), max(pair))), min_size=1, max_size=12)


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def minter(tmp_path: Path, clock: Clock) -> Minter:
    return Minter(tmp_path / "keys.json", clock)


def test_round_trip(minter: Minter) -> None:
    token = minter.mint("microvm-1", [(80, 90), (85, 100), (8080, 8080)], 600)
    grant = Checker(minter.verifiers()).verify(token, NOW)
    assert (grant.session, grant.expires, grant.kind) == ("microvm-1", NOW + 600, "proxy")
    assert grant.ports == ((80, 100), (8080, 8080))
    assert [grant.allows(port) for port in (79, 80, 100, 101, 8080, 65535)] == [False, True, True, False, True, False]


def test_claims_are_unreadable(minter: Minter) -> None:
    token = minter.mint("microvm-secret", [(80, 80)], 600)
    header, key, *rest = token.split(".")
    assert key == "" and set(json.loads(base64.urlsafe_b64decode(header + "=="))) == {"kid", "alg", "enc"}
    assert all(b"microvm" not in base64.urlsafe_b64decode(part + "==") for part in rest)


def test_expires_to_the_second(minter: Minter) -> None:
    checker = Checker(minter.verifiers())
    token = minter.mint("s", [(1, 1)], 60)
    checker.verify(token, NOW + 59.9)
    with pytest.raises(TokenError, match="expired"):
        checker.verify(token, NOW + 60)
    assert checker.verify(token, NOW).expires == NOW + 60


def test_what_is_remembered_is_bounded_and_refusals_are_not(minter: Minter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_REMEMBERED", 8)
    checker = Checker(minter.verifiers())
    for number in range(20):
        assert checker.verify(minter.mint(f"s{number}", [(1, 1)], 60), NOW).session == f"s{number}"
        with pytest.raises(TokenError):
            checker.verify(f"{number}", NOW)
    assert checker._seen.cache_info().currsize == 8


@given(st.data())
def test_any_change_is_refused(data: st.DataObject) -> None:
    token, checker = _CHANGED
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.sampled_from("ABCxyz019-_.= \x00é"))
    changed = token[:at] + other + token[at + 1 :]
    if changed == token:
        return
    try:
        checker.verify(changed, NOW)
    except TokenError:
        return
    # base64url's last character has spare bits: the same bytes, so the same token.
    assert [base64.urlsafe_b64decode(p + "==") for p in changed.split(".")] == [
        base64.urlsafe_b64decode(p + "==") for p in token.split(".")
    ]


@given(st.integers(0, 400))
def test_any_cut_is_refused(length: int) -> None:
    token, checker = _CHANGED
    if length < len(token):
        with pytest.raises(TokenError):
            checker.verify(token[:length], NOW)


@given(st.text(max_size=200))
def test_garbage_is_malformed(text: str) -> None:
    with pytest.raises(MalformedToken):
        _CHANGED[1].verify(text, NOW)


def _made() -> tuple[str, Checker]:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        minter = Minter(Path(directory) / "keys", lambda: NOW)
        return minter.mint("s", [(1, 65535)], 600), Checker(minter.verifiers())


_CHANGED = _made()


def forge(minter: Minter, inner: str, header: dict[str, str] | None = None) -> str:
    """An envelope with the right encryption key, as an edge that was broken into could make it."""
    verifier = minter.verifiers()[-1]
    head = base64.urlsafe_b64encode(json.dumps(header or {"kid": verifier.kid, "alg": "dir", "enc": "A256GCM"}).encode()).rstrip(b"=")
    sealed = AESGCM(verifier.encryption_key).encrypt(b"\0" * 12, inner.encode(), head)
    parts = [base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (b"\0" * 12, sealed[:-16], sealed[-16:])]
    return f"{head.decode()}..{'.'.join(parts)}"


@pytest.mark.parametrize("algorithm", ["none", "HS256", "EdDSA"])
def test_edge_keys_cannot_sign(minter: Minter, algorithm: str) -> None:
    """With everything an edge has, no token can be made: not unsigned, not signed with the public key as a secret."""
    claims = {"sub": "s", "ports": [[1, 65535]], "exp": int(NOW) + 600, "kind": "proxy"}
    public = minter.verifiers()[-1].public_key
    key = {"none": None, "HS256": public, "EdDSA": Ed25519PrivateKey.generate()}[algorithm]
    with pytest.raises(TokenError, match="not signed with our key"):
        Checker(minter.verifiers()).verify(forge(minter, jwt.encode(claims, key, algorithm=algorithm)), NOW)


def test_unknown_key(minter: Minter, tmp_path: Path) -> None:
    other = Minter(tmp_path / "other.json", lambda: NOW)
    with pytest.raises(TokenError, match="unknown key"):
        Checker(minter.verifiers()).verify(other.mint("s", [(1, 1)], 60), NOW)


def test_rotation_keeps_what_was_minted(minter: Minter, clock: Clock) -> None:
    old = minter.mint("s", [(1, 1)], LONGEST_SECONDS)
    assert not minter.make_key_if_due()
    clock.now += ROTATE_SECONDS
    old = minter.mint("s", [(1, 1)], LONGEST_SECONDS)
    assert minter.make_key_if_due()
    assert (
        Checker(minter.verifiers()).verify(minter.mint("s", [(1, 1)], 60), clock.now).kid
        == Checker(minter.verifiers()).verify(old, clock.now).kid
    )
    minter.use_newest()
    new = minter.mint("s", [(1, 1)], LONGEST_SECONDS)
    checker = Checker(minter.verifiers())
    assert checker.verify(old, clock.now).kid != checker.verify(new, clock.now).kid
    clock.now += LONGEST_SECONDS + 600
    minter.rotate()
    with pytest.raises(TokenError, match="unknown key"):
        Checker(minter.verifiers()).verify(old, clock.now - 1)


def test_keys_survive_a_restart_and_are_private(tmp_path: Path) -> None:
    token = Minter(tmp_path / "k", lambda: NOW).mint("s", [(5, 6)], 60)
    again = Minter(tmp_path / "k", lambda: NOW)
    assert Checker(again.verifiers()).verify(token, NOW).session == "s"
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600


@given(RANGES, PORTS)
def test_merged_ranges_allow_the_same_ports(ranges: list[tuple[int, int]], port: int) -> None:
    merged = merge(ranges)
    assert merged == sorted(merged) and all(a[1] + 1 < b[0] for a, b in itertools.pairwise(merged))
    grant = Grant("s", tuple(merged), 0, "proxy", "")
    for candidate in {port, *(end for pair in ranges for end in pair), *(min(65535, pair[1] + 1) for pair in ranges)}:
        assert grant.allows(candidate) == any(first <= candidate <= last for first, last in ranges)


def test_a_key_that_cannot_be_stored_signs_nothing(minter: Minter, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers would not know it, and its tokens would be refused."""
    before = minter.verifiers()
    clock.now += ROTATE_SECONDS + 1

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            minter.make_key_if_due()
    assert minter.verifiers() == before
    assert Checker(before).verify(minter.mint("s1", [(1, 65535)], 60), clock.now).session == "s1"
    assert minter.make_key_if_due() and len(minter.verifiers()) == 2
