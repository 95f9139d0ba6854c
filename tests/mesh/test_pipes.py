"""What a relay lets pass, and for whom."""

from __future__ import annotations

from pinaivu_node.mesh.pipes import Pipe, PipeBook, RelayLimits
from pinaivu_node.protocol.ids import PeerId

A, B, C, D = (PeerId(name) for name in "abcd")
LIMITS = RelayLimits(
    pipes=3, pipes_per_peer=2, bytes_per_second=100, burst=200, bytes_per_pipe=1000
)


def opened(book: PipeBook, source: PeerId, target: PeerId) -> Pipe:
    pipe = book.open(source, target)
    assert isinstance(pipe, Pipe)
    return pipe


def test_pipes_are_bounded_by_peer_and_in_all() -> None:
    book = PipeBook(LIMITS)
    first = opened(book, A, B)
    opened(book, C, A)
    assert "has 2 pipes" in str(book.open(A, D))
    assert "has 2 pipes" in str(book.open(D, A))
    opened(book, C, D)
    assert "all 3 pipes" in str(book.open(B, D))
    book.close(first)
    opened(book, B, D)
    assert (len(book), book.pipes_made, book.refused) == (3, 4, 3)


def test_nobody_is_connected_with_himself() -> None:
    assert "yourself" in str(PipeBook(LIMITS).open(A, A))


def test_a_sender_waits_once_its_burst_is_used_up() -> None:
    book = PipeBook(LIMITS)
    pipe = opened(book, A, B)
    assert book.pass_on(pipe, A, 200, now=0) == 0
    assert book.pass_on(pipe, A, 50, now=0) == 0.5
    assert book.pass_on(pipe, B, 50, now=0) == 0  # the other way is the other's
    assert book.pass_on(pipe, A, 50, now=1) == 0


def test_a_new_pipe_brings_no_new_burst() -> None:
    book = PipeBook(LIMITS)
    pipe = opened(book, A, B)
    book.pass_on(pipe, A, 200, now=0)
    book.close(pipe)
    assert book.pass_on(opened(book, A, B), A, 100, now=0) == 1


def test_a_pipe_carries_so_much_and_no_more() -> None:
    book = PipeBook(LIMITS)
    pipe = opened(book, A, B)
    assert book.pass_on(pipe, A, 1000, now=0) is not None
    assert book.pass_on(pipe, B, 1, now=100) is None
    assert book.bytes_passed == 1000


def test_those_who_send_no_more_are_forgotten() -> None:
    book = PipeBook(RelayLimits())
    for number in range(12_000):
        pipe = opened(book, PeerId(f"p{number}"), B)
        book.pass_on(pipe, PeerId(f"p{number}"), 1, now=0)
        book.close(pipe)
    assert len(book._allowances) == 10_000
    assert not book._count
