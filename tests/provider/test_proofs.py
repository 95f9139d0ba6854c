from __future__ import annotations

import pytest
import trio

from pinaivu_node.protocol.wire import encode
from pinaivu_node.provider.jobs import STOPPED, Job
from pinaivu_node.provider.proofs import ProofSpool, UnpaidProofs


@pytest.fixture
def proof(facts):
    def made():
        dispatch = facts.dispatch()
        job = Job(dispatch, facts.token(request_id=dispatch.request_id), now=0.0)
        sealed = facts.provider.seal(job.proof(STOPPED, me=facts.provider.peer_id, now=1.0))
        return dispatch.request_id, sealed

    return made


@pytest.fixture
def spool(tmp_path):
    return ProofSpool(tmp_path / "proofs")


def test_what_is_stored_is_there_after_a_crash(spool, proof, facts, tmp_path):
    stored = dict(proof() for _ in range(3))
    spool.store(stored)
    assert dict(ProofSpool(tmp_path / "proofs").load(facts.provider.peer_id)) == stored


def test_what_is_removed_stays_away(spool, proof, facts):
    (first, one), (second, two) = proof(), proof()
    spool.store({first: one, second: two})
    spool.remove([first, first])
    assert spool.load(facts.provider.peer_id) == [(second, two)]


def test_files_that_hold_no_proof_of_ours_are_passed_over(spool, proof, facts, tmp_path):
    request_id, envelope = proof()
    spool.store({request_id: envelope})
    folder = tmp_path / "proofs"
    (folder / f"{facts.request_id()}.proof").write_bytes(b"half a proo")
    (folder / f".{facts.request_id()}").write_bytes(encode(envelope)[:40])
    (folder / "notes.txt").write_text("mine")
    forged = envelope.model_copy(update={"signer": facts.stranger.peer_id})
    (folder / f"{facts.request_id()}.proof").write_bytes(encode(forged))
    assert spool.load(facts.provider.peer_id) == [(request_id, envelope)]


async def test_a_proof_is_on_disk_before_it_is_told(spool, proof, facts, nursery):
    proofs = UnpaidProofs(spool, capacity=10)
    await proofs.load(facts.provider.peer_id)
    request_id, envelope = proof()
    proofs.add(request_id, envelope)
    with trio.move_on_after(0) as scope:
        await proofs.next_to_send()
    assert scope.cancelled_caught
    nursery.start_soon(proofs.keep)
    assert await proofs.next_to_send() == envelope
    assert spool.load(facts.provider.peer_id) == [(request_id, envelope)]


async def test_a_settled_proof_leaves_memory_and_disk(spool, proof, facts):
    proofs = UnpaidProofs(spool, capacity=10)
    request_id, envelope = proof()
    proofs.add(request_id, envelope)
    await proofs.flush()
    assert proofs.settle(request_id)
    assert not proofs.settle(request_id)
    await proofs.flush()
    assert len(proofs) == 0
    assert spool.load(facts.provider.peer_id) == []


async def test_another_life_finds_what_was_not_paid(spool, proof, facts):
    proofs = UnpaidProofs(spool, capacity=10)
    stored = dict(proof() for _ in range(2))
    for request_id, envelope in stored.items():
        proofs.add(request_id, envelope)
    await proofs.flush()
    reborn = UnpaidProofs(spool, capacity=10)
    await reborn.load(facts.provider.peer_id)
    assert [await reborn.next_to_send() for _ in stored] == list(stored.values())


async def test_a_new_session_is_told_everything_again(proof):
    proofs = UnpaidProofs(None, capacity=10)
    (first, one), (second, two) = proof(), proof()
    proofs.add(first, one)
    proofs.add(second, two)
    assert [await proofs.next_to_send(), await proofs.next_to_send()] == [one, two]
    proofs.settle(first)
    proofs.start_over()
    assert await proofs.next_to_send() == two


async def test_the_oldest_is_given_up_when_there_are_too_many(spool, proof, facts, caplog):
    proofs = UnpaidProofs(spool, capacity=2)
    made = [proof() for _ in range(3)]
    for request_id, envelope in made:
        proofs.add(request_id, envelope)
    await proofs.flush()
    await proofs.flush()
    assert made[0][0] not in proofs
    assert len(proofs) == 2
    assert dict(spool.load(facts.provider.peer_id)) == dict(made[1:])
    assert "gave up the proof" in caplog.text


async def test_a_disk_that_fails_does_not_hold_a_proof_back(proof, tmp_path, caplog):
    (tmp_path / "proofs").write_text("a file where the folder should be")
    proofs = UnpaidProofs(ProofSpool(tmp_path / "proofs"), capacity=2)
    request_id, envelope = proof()
    proofs.add(request_id, envelope)
    await proofs.flush()
    assert await proofs.next_to_send() == envelope
    assert "cannot keep proofs on disk" in caplog.text
