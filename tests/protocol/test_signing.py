"""A signature says who said what, for which purpose, and nothing else passes for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from samples import BID, COORDINATOR, GATEWAY, PROVIDER, RECEIPT, REQUEST, SAMPLES

from pinaivu_node.protocol.errors import LocalProtocolError, PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId, peer_id_of, public_key_of, request_id_of
from pinaivu_node.protocol.market import Bid, JobRefused, Pass, PassReason, Voucher
from pinaivu_node.protocol.receipt import Receipt
from pinaivu_node.protocol.signing import Envelope, Signer, open_untrusted


def test_what_was_signed_is_what_is_opened() -> None:
    assert open_untrusted(PROVIDER.seal(BID), Bid, Pass, signer=PROVIDER.peer_id) == BID


def test_a_signature_is_always_the_same() -> None:
    assert PROVIDER.seal(BID) == PROVIDER.seal(BID)


@pytest.mark.parametrize("change", ["body", "signature", "content", "signer"])
def test_any_altered_part_is_refused(change: str) -> None:
    sealed = PROVIDER.seal(BID)
    altered = {
        "body": sealed.body[:-1] + bytes([sealed.body[-1] ^ 1]),
        "signature": sealed.signature[:-1] + bytes([sealed.signature[-1] ^ 1]),
        "content": Pass.kind,
        "signer": GATEWAY.peer_id,
    }
    forged = sealed.model_copy(update={change: altered[change]})
    with pytest.raises(RemoteProtocolError):
        open_untrusted(forged, Bid, Pass, signer=PROVIDER.peer_id)


@given(st.sampled_from(["body", "signature"]), st.integers(0, 10**6))
def test_not_one_bit_can_be_changed(part: str, number: int) -> None:
    sealed = PROVIDER.seal(BID)
    altered = bytearray(getattr(sealed, part))
    altered[number // 8 % len(altered)] ^= 1 << number % 8
    forged = sealed.model_copy(update={part: bytes(altered)})
    with pytest.raises(RemoteProtocolError, match="does not verify"):
        open_untrusted(forged, Bid, signer=PROVIDER.peer_id)


def test_a_signature_has_one_form() -> None:
    """Adding the group's order to its scalar gives a second one that lax verifiers take."""
    sealed = PROVIDER.seal(BID)
    order = 2**252 + 27742317777372353535851937790883648493
    scalar = int.from_bytes(sealed.signature[32:], "little") + order
    second = sealed.signature[:32] + scalar.to_bytes(32, "little")
    with pytest.raises(RemoteProtocolError, match="does not verify"):
        open_untrusted(
            sealed.model_copy(update={"signature": second}), Bid, signer=PROVIDER.peer_id
        )


def test_what_was_opened_under_one_kind_opens_under_no_other() -> None:
    """Every signed kind, relabelled as every other."""
    kinds = [type(sample) for sample in SAMPLES]
    for sample in SAMPLES:
        sealed = PROVIDER.seal(sample)
        for kind in kinds:
            relabelled = sealed.model_copy(update={"content": kind.kind})
            if kind is type(sample):
                assert open_untrusted(relabelled, kind, signer=PROVIDER.peer_id) == sample
                continue
            with pytest.raises(RemoteProtocolError, match="does not verify"):
                open_untrusted(relabelled, *kinds, signer=PROVIDER.peer_id)


def test_a_forged_signature_asks_for_a_ban() -> None:
    forged = PROVIDER.seal(BID).model_copy(update={"signature": bytes(64)})
    with pytest.raises(RemoteProtocolError) as caught:
        open_untrusted(forged, Bid, signer=PROVIDER.peer_id)
    assert caught.value.action is PeerAction.BAN


def test_a_body_signed_for_one_purpose_does_not_serve_another() -> None:
    """A Pass and a Voucher made to have equal bodies still differ by what was signed."""
    passing = Pass(request_id=REQUEST, bidder=PROVIDER.peer_id, reason=PassReason.FULL)
    sealed = PROVIDER.seal(passing)
    relabelled = sealed.model_copy(update={"content": JobRefused.kind})
    with pytest.raises(RemoteProtocolError, match="does not verify"):
        open_untrusted(relabelled, JobRefused, Voucher, signer=PROVIDER.peer_id)


def test_the_signer_must_be_the_one_expected() -> None:
    with pytest.raises(RemoteProtocolError, match="not by"):
        open_untrusted(GATEWAY.seal(RECEIPT), Receipt, signer=COORDINATOR.peer_id)


def test_the_digest_names_the_statement_and_not_the_signature() -> None:
    sealed = PROVIDER.seal(BID)
    assert sealed.digest == GATEWAY.seal(BID).digest
    assert sealed.digest != sealed.model_copy(update={"content": "pass/1"}).digest


@given(st.binary(min_size=64, max_size=64), st.binary(max_size=64))
def test_random_signatures_raise_only_the_remote_error(signature: bytes, body: bytes) -> None:
    forged = Envelope(content="bid/1", body=body, signer=PROVIDER.peer_id, signature=signature)
    with pytest.raises(RemoteProtocolError):
        open_untrusted(forged, Bid, signer=PROVIDER.peer_id)


# Points of small order (their signatures can be made to fit any message) and bytes that are none.
WEAK_KEYS = [
    bytes(32),
    b"\x01" + bytes(31),
    b"\xec" + b"\xff" * 30 + b"\x7f",
    bytes(31) + b"\x80",
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
    b"\xff" * 32,
]


@pytest.mark.parametrize("key", WEAK_KEYS, ids=bytes.hex)
def test_weak_and_impossible_keys_sign_nothing(key: bytes) -> None:
    weak = peer_id_of(key)
    # What verifies under a key of order one: R is that point too, and the scalar is zero.
    for signature in (bytes(64), b"\x01" + bytes(63), key + bytes(32)):
        forged = Envelope(content="bid/1", body=b"\x80", signer=weak, signature=signature)
        with pytest.raises(RemoteProtocolError, match="does not verify"):
            open_untrusted(forged, Bid, signer=weak)


def test_a_body_too_long_to_be_opened_is_never_signed() -> None:
    from pinaivu_node.protocol.receipt import BidSetReply

    with pytest.raises(LocalProtocolError):
        PROVIDER.seal(BidSetReply(request_id=REQUEST, leaves=(b"x" * 70_000,)))


@given(st.binary(min_size=32, max_size=32))
def test_peer_ids_are_those_of_libp2p(seed: bytes) -> None:
    signer = Signer(seed)
    theirs = create_new_key_pair(seed).public_key
    assert signer.peer_id == ID.from_pubkey(theirs).to_base58()
    assert public_key_of(signer.peer_id) == theirs.to_bytes()


@pytest.mark.parametrize(
    "text", ["", "12D3KooW", "Qm" + "a" * 44, "0OIl", "é" * 20, "1" * 64, "z" * 10_000]
)
def test_what_spells_no_key_is_no_peer_id(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        public_key_of(PeerId(text))


@pytest.mark.parametrize("space", [" ", "\n", "\t", "\x1c", "\xa0", "\u2003"])
def test_a_key_has_one_spelling(space: str) -> None:
    for text in (PROVIDER.peer_id + space, space + PROVIDER.peer_id, "1" + PROVIDER.peer_id):
        with pytest.raises(ValueError, match=r".+"):
            public_key_of(PeerId(text))


def test_a_request_id_is_made_of_sixteen_bytes() -> None:
    assert request_id_of(bytes(16)) == "req_" + "0" * 32
    with pytest.raises(ValueError, match="16 random bytes"):
        request_id_of(bytes(15))
