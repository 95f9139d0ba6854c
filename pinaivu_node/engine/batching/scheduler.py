"""Which tokens the next step computes: pure decisions over sequences and blocks.

Every sequence that streams gets its next token in every step.  What is left of the step's budget
goes to prompts, in order of arrival, in chunks: a long prompt takes many steps, and those who
stream wait for a chunk of it, never for the whole.

Blocks are taken as they are needed, not reserved for the longest answer that a request allows:
clients ask for far more tokens than they use, and reservation would leave most of the cache empty.
When blocks run out, the sequence that joined last gives its blocks back and is computed again when
there is room.  That costs time and nothing else: the answer goes on with the very same tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from pinaivu_node.engine.batching.blocks import BlockPool
from pinaivu_node.engine.batching.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute these tokens of a sequence, and after its last one what is guessed to follow."""

    sequence: Sequence
    start: int
    count: int
    """Without what is guessed."""
    guess: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """All that is to be computed."""
        return [*self.sequence.tokens[self.start : self.start + self.count], *self.guess]

    @property
    def rows(self) -> int:
        """How many of its last tokens are to have logits: one if the sequence's next token can be
        drawn afterwards, and one per guess.
        """
        reaches_end = self.start + self.count == len(self.sequence.tokens)
        return 1 + len(self.guess) if reaches_end else 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One step."""

    chunks: tuple[Chunk, ...]
    decoding: int
    """How many chunks, the first ones, are the next token of a sequence that streams."""

    @property
    def prefill_tokens(self) -> int:
        """Tokens of prompts."""
        return sum(chunk.count for chunk in self.chunks[self.decoding :])


class Fit(Enum):
    """Whether a sequence can be taken."""

    NOW = "now"
    LATER = "later"
    NEVER = "never"


class Scheduler:
    """Waiting and running sequences."""

    def __init__(self, pool: BlockPool, *, max_running: int) -> None:
        self.running: list[Sequence] = []
        """In order of joining."""
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self._pool = pool
        self._max_running = max_running

    def fits(self, tokens: int) -> Fit:
        """Whether a sequence of so many tokens, and one more, finds room."""
        blocks = self._blocks_for(tokens + 1)
        if blocks > self._pool.count:
            return Fit.NEVER
        free = len(self.running) < self._max_running and not self.waiting
        return Fit.NOW if free and blocks <= self._pool.available else Fit.LATER

    def add(self, sequence: Sequence) -> None:
        """Take a sequence; it runs when its turn comes."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, *, now: float) -> None:
        """Forget a sequence that is over; what it computed stays in the prefix cache."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence, now=now)
        else:
            self.waiting.remove(sequence)

    def plan(
        self,
        *,
        prefill_tokens: int,
        now: float,
        guess: Callable[[Sequence], list[int]] = lambda _sequence: [],
    ) -> Plan:
        """The next step, with at most so many tokens of prompts; blocks for it are taken.

        `guess` says what may follow a sequence that streams; no block is taken for that.
        """
        decoding = self._plan_decode(now=now)
        chunks = []
        for each in decoding:
            room = len(each.blocks) * self._pool.size - len(each.tokens)
            guessed = tuple(guess(each)[:room]) if room else ()
            chunks.append(Chunk(each, each.computed, 1, guessed))
        budget = prefill_tokens
        for sequence in self.running:
            if budget > 0 and not sequence.is_decoding:
                count = min(sequence.to_compute, budget)
                chunks.append(Chunk(sequence, sequence.computed, count))
                budget -= count
        while budget > 0 and (joining := self._admit(now=now)) is not None:
            count = min(joining.to_compute, budget)
            chunks.append(Chunk(joining, joining.computed, count))
            budget -= count
        return Plan(tuple(chunks), len(decoding))

    def computed(self, plan: Plan) -> None:
        """The step was made: its keys and values, but for what was guessed, are in the cache."""
        for chunk in plan.chunks:
            self._advance(chunk.sequence, chunk.count)

    def guessed_right(self, sequence: Sequence) -> None:
        """The token that was drawn is the one that was guessed, and computed already."""
        self._advance(sequence, 1)

    def _advance(self, sequence: Sequence, tokens: int) -> None:
        before = sequence.computed // self._pool.size
        sequence.computed += tokens
        after = sequence.computed // self._pool.size
        if after > before:
            names = sequence.name_blocks(size=self._pool.size)
            for number in range(before, after):
                self._pool.name(sequence.blocks[number], names[number])

    def _plan_decode(self, *, now: float) -> list[Sequence]:
        """The sequences that stream, each with a block for its next token.

        Those that joined first come first, so that the one that gives way is the last.
        """
        for sequence in [each for each in self.running if each.is_decoding]:
            while sequence in self.running and not self._grow(sequence):
                self._preempt(self.running[-1], now=now)
        return [each for each in self.running if each.is_decoding]

    def _grow(self, sequence: Sequence) -> bool:
        """Whether it has blocks for all its tokens, after taking what was missing."""
        missing = self._blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        if missing <= 0:
            return True
        blocks = self._pool.take(missing)
        if blocks is None:
            return False
        sequence.blocks += blocks
        return True

    def _preempt(self, sequence: Sequence, *, now: float) -> None:
        self.running.remove(sequence)
        self._release(sequence, now=now)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence, *, now: float) -> None:
        self._pool.release(sequence.blocks, now=now)
        sequence.blocks = []

    def _admit(self, *, now: float) -> Sequence | None:
        """Let the first one join that may; None if there is no room or nobody waits."""
        if len(self.running) >= self._max_running:
            return None
        for sequence in self.waiting:
            if self._is_being_computed(sequence):
                continue  # a little later it can share instead of computing the same
            return sequence if self._join(sequence, now=now) else None
        return None

    def _join(self, sequence: Sequence, *, now: float) -> bool:
        # The last token is always computed: its logits are what is wanted.
        usable = (len(sequence.tokens) - 1) // self._pool.size
        names = sequence.name_blocks(size=self._pool.size)[:usable]
        shared = self._pool.known(names)
        wanted = self._blocks_for(len(sequence.tokens))
        sequence.blocks = self._pool.share(names)
        blocks = self._pool.take(wanted - shared)
        if blocks is None:
            self._release(sequence, now=now)
            return False
        sequence.blocks += blocks
        sequence.computed = shared * self._pool.size
        if not sequence.joined:
            sequence.joined = True
            sequence.cached = sequence.computed
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute the next block that this one needs."""
        size = self._pool.size
        names = sequence.name_blocks(size=size)[: (len(sequence.tokens) - 1) // size]
        known = self._pool.known(names)
        if known == len(names):
            return False
        return any(
            each.computed < (known + 1) * size
            and len(each.names) > known
            and each.names[known] == names[known]
            for each in self.running
            if not each.is_decoding
        )

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._pool.size)
