"""One answer in the making, as the scheduler sees it: tokens, and where in the cache they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from pinaivu_node.engine.batching.blocks import next_name, root_name


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens in, tokens out.

    `tokens` are the prompt and what was drawn since; the keys and values of the first `computed`
    are in the cache.  Only the last token is ever drawn and not computed, but for a sequence that
    joins, or joins again after it was preempted.
    """

    tokens: list[int]
    tenant: bytes = b""
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    """Tokens of the prompt that were found in the prefix cache when it first joined."""
    names: list[bytes] = field(default_factory=list)
    """Of the full blocks of `tokens`, as far as they were needed."""
    joined: bool = False
    """Whether it ran before; what is found in the cache after a preemption is no cache hit."""

    @property
    def to_compute(self) -> int:
        """Tokens whose keys and values are not in the cache."""
        return len(self.tokens) - self.computed

    @property
    def is_decoding(self) -> bool:
        """Whether it is one step from its next token."""
        return self.to_compute == 1 and self.computed > 0

    def name_blocks(self, *, size: int) -> list[bytes]:
        """The names of all its full blocks."""
        while (len(self.names) + 1) * size <= len(self.tokens):
            start = len(self.names) * size
            previous = self.names[-1] if self.names else root_name(self.tenant)
            self.names.append(next_name(previous, self.tokens[start : start + size]))
        return self.names
