"""Prices, costs and bills: whole NanoX, rounded once, always up."""

from __future__ import annotations

from typing import Final

from pinaivu_node.protocol.ids import (
    MAX_SAFE_INTEGER,
    MILLION,
    NanoX,
    NanoXField,
    PartsPerMillion,
    TokenCount,
)
from pinaivu_node.protocol.wire import Record

PER_UPLIFTED_TOKEN: Final = MILLION * MILLION
"""Prices are per million tokens and the uplift is in ppm: one division removes both."""


class PriceList(Record):
    """NanoX per million tokens of each kind."""

    input: NanoXField
    cached_input: NanoXField
    output: NanoXField

    def is_within(self, ceiling: PriceList) -> bool:
        """Whether no price is above the ceiling's."""
        return (
            self.input <= ceiling.input
            and self.cached_input <= ceiling.cached_input
            and self.output <= ceiling.output
        )


class TokenUsage(Record):
    """How many tokens of each kind.  `cached_input` is the part of the prompt that was found warm;
    `input` is the rest, so the prompt is the sum of the two.
    """

    input: TokenCount
    cached_input: TokenCount
    output: TokenCount

    @property
    def prompt(self) -> int:
        """All prompt tokens, warm or not."""
        return self.input + self.cached_input

    def __add__(self, other: TokenUsage) -> TokenUsage:
        """Both together."""
        return TokenUsage(
            input=self.input + other.input,
            cached_input=self.cached_input + other.cached_input,
            output=self.output + other.output,
        )


ZERO_USAGE: Final = TokenUsage(input=0, cached_input=0, output=0)


NO_UPLIFT: Final = PartsPerMillion(0)
NOTHING: Final = NanoX(0)


def cost(usage: TokenUsage, prices: PriceList, *, uplift_ppm: PartsPerMillion = NO_UPLIFT) -> NanoX:
    """What this usage costs at a price list raised by `uplift_ppm`; rounded up, once.

    Capped at 2⁵³−1 so that every number in a receipt is exact in JavaScript.
    """
    per_million = (
        usage.input * prices.input
        + usage.cached_input * prices.cached_input
        + usage.output * prices.output
    )
    scaled = per_million * (MILLION + uplift_ppm)
    return NanoX(min(ceil_div(scaled, PER_UPLIFTED_TOKEN), MAX_SAFE_INTEGER))


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)
