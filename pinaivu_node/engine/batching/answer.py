"""One answer in the making, as its reader sees it: what each token shows, and when it is over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pinaivu_node.engine.batching.lookup import PromptLookup
from pinaivu_node.engine.batching.sequence import Sequence
from pinaivu_node.engine.chat.text import AnswerText, Vocabulary
from pinaivu_node.engine.chat.tool_calls import Parsed, ToolCallParser
from pinaivu_node.engine.sampling.constraint import Matcher
from pinaivu_node.engine.sampling.sampler import Chosen, Draw, SequenceSampling
from pinaivu_node.engine.types import (
    Alternative,
    FinishReason,
    GenerationRequest,
    PromptRefused,
    TokenEvent,
    TokenLogprob,
)


@dataclass(frozen=True, slots=True)
class Ending:
    """What ends an answer, by token or by length."""

    stop_ids: frozenset[int]
    length: int
    """Of the whole sequence, prompt included."""


class Answer:
    """Tokens in, events out; the keys and values are the scheduler's business."""

    def __init__(  # noqa: PLR0913 - an answer has as many parts
        self,
        request: GenerationRequest,
        *,
        index: int,
        sequence: Sequence,
        sampling: SequenceSampling,
        text: AnswerText,
        ending: Ending,
        vocabulary: Vocabulary,
        parser: ToolCallParser | None = None,
        matcher: Matcher | None = None,
        lookup: PromptLookup | None = None,
    ) -> None:
        """`sequence` is the prompt alone: what a resumed answer has already is taken here."""
        self.sequence: Final = sequence
        self.index: Final = index
        self.matcher: Final = matcher
        self.finished: FinishReason | None = None
        """Set when it is over."""
        self._request = request
        self._prompt_tokens = len(sequence.tokens)
        self._sampling = sampling
        self._text = text
        self._ending = ending
        self._vocabulary = vocabulary
        self._parser = parser
        self._lookup = lookup
        self._error: str | None = None
        if len(sequence.tokens) >= ending.length:
            self.finished = FinishReason.LENGTH
        # The reader has the text of these; text, calls and penalties go on from where they were.
        for token_id in request.resume_token_ids:
            if self.finished is None:
                self._take(token_id)
        if self._error is not None:
            raise PromptRefused(f"The answer cannot be gone on with. {self._error}")

    def guess(self, most: int) -> list[int]:
        """At most so many tokens that may come next; fewer than the answer can still have."""
        if self._lookup is None:
            return []
        return self._lookup.guess(min(most, self._ending.length - len(self.sequence.tokens) - 1))

    def judge(self, *, guessed: int, right: int) -> None:
        """What came of a guess."""
        if self._lookup is not None:
            self._lookup.judge(guessed=guessed, right=right)

    def draw(self, allowed: object) -> Draw:
        """What the sampler needs for this answer's next token."""
        return Draw(self._sampling, len(self.sequence.tokens), allowed)  # type: ignore[arg-type]

    def take(self, chosen: Chosen) -> TokenEvent:
        """Account for the next token."""
        parsed = self._take(chosen.token_id)
        if self._error is not None:
            return self._event((), parsed, error=self._error)
        return self._event((chosen.token_id,), parsed, logprobs=self._logprobs(chosen))

    def ended(self, reason: FinishReason, *, error: str | None = None) -> TokenEvent:
        """The last event of an answer that is broken off: cancelled, or failed.

        Where the constraint failed, that is why.
        """
        self.finished = reason
        if error is not None and self.matcher is not None:
            error = self.matcher.error or error
        return self._event((), self._flush(), error=error)

    def broken(self, error: str) -> TokenEvent:
        """The last event of an answer whose text cannot be read: what was held back is lost."""
        self.finished = FinishReason.ERROR
        return self._event((), Parsed("", ()), error=error)

    def over(self) -> TokenEvent:
        """The only event of an answer that was over before its first token."""
        return self._event((), Parsed("", ()))

    def _take(self, token_id: int) -> Parsed:
        """Count a token of the answer; what it shows.

        Sets `finished` if it is the last, and `_error` if the constraint cannot go on by it.
        """
        self.sequence.tokens.append(token_id)
        self._sampling.observe(token_id)
        if token_id in self._ending.stop_ids:
            self.finished = FinishReason.STOP
            return self._flush()
        if self.matcher is not None and not self.matcher.accept(token_id):
            self._error = self.matcher.error or "The constraint forbids what was said."
            self.finished = FinishReason.ERROR
            return self._flush()
        shown = self._text.push(token_id)
        if shown.stopped:
            self.finished = FinishReason.STOP
            return self._closed(shown.text)
        if self.matcher is not None and self.matcher.is_finished:
            self.finished = FinishReason.STOP
        elif len(self.sequence.tokens) >= self._ending.length:
            self.finished = FinishReason.LENGTH
        else:
            return self._parsed(shown.text)
        rest = self._text.finish()
        if rest.stopped:
            self.finished = FinishReason.STOP
        return self._closed(shown.text + rest.text)

    def _parsed(self, text: str) -> Parsed:
        return Parsed(text, ()) if self._parser is None else self._parser.push(text)

    def _flush(self) -> Parsed:
        return self._closed(self._text.finish().text)

    def _closed(self, text: str) -> Parsed:
        """The last of the text; a whole call in an answer that ended well is why it ended."""
        if self._parser is None:
            return Parsed(text, ())
        last, rest = self._parser.push(text), self._parser.finish()
        if self.finished is FinishReason.STOP and self._parser.whole_calls:
            self.finished = FinishReason.TOOL_CALLS
        return Parsed(last.text + rest.text, last.deltas + rest.deltas)

    def _logprobs(self, chosen: Chosen) -> tuple[TokenLogprob, ...]:
        if chosen.logprob is None:
            return ()
        bytes_of = self._vocabulary.of
        return (
            TokenLogprob(
                Alternative(chosen.token_id, bytes_of(chosen.token_id), chosen.logprob),
                tuple(Alternative(i, bytes_of(i), logprob) for i, logprob in chosen.top),
            ),
        )

    def _event(
        self,
        token_ids: tuple[int, ...],
        parsed: Parsed,
        *,
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
    ) -> TokenEvent:
        return TokenEvent(
            request_id=self._request.id,
            token_ids=token_ids,
            text=parsed.text,
            input_tokens=self._prompt_tokens,
            cached_tokens=min(self.sequence.cached, self._prompt_tokens),
            finish_reason=self.finished,
            error=error,
            index=self.index,
            logprobs=logprobs,
            tool_calls=parsed.deltas,
        )
