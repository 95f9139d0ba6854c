"""Answers that must match something: a constraint to a mask of the tokens that may come next.

llguidance makes the masks, token by token.  Against xgrammar, on 25 schemas as people write them:
its masks take longer (median 11 µs against 4 µs with 49,152 tokens, 19 against 7 with 262,144),
but no grammar took over 4 and 11 ms to make, where xgrammar took 1.8 and 9.8 seconds for the worst
(a string of at most 200 characters); and where it cannot hold an answer to a keyword (`not`, `if`,
`uniqueItems`, `contains`) it says so by name, where xgrammar takes the schema and lets a wrong
answer pass.

A constraint comes from a stranger.  Making a grammar lets other threads run but cannot be
interrupted, so what would take long is refused by its shape beforehand; a mask is bounded by
llguidance's limits, and what all the masks of an answer take is bounded here.  Whatever goes wrong
with one answer's grammar is that answer's error: its batch goes on.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from pinaivu_node.engine.sampling import schema
from pinaivu_node.engine.types import Constraint, ConstraintKind, EngineBusy, PromptRefused

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SOURCE_CHARACTERS: Final = 1 << 18
MAX_REGEX_CHARACTERS: Final = 8192
"""Making its automaton takes time with the square of these: 0.2 s."""
MAX_CHOICES: Final = 10_000
MAX_LARK_CHARACTERS: Final = 8192
"""Of a stranger's grammar; one made here for tools may have all there are."""
_MAX_CACHED: Final = 64
_MAX_CACHED_CHARACTERS: Final = 1 << 20
"""A character of a large schema takes some 300 bytes."""
_JSON_OPTIONS: Final[JsonCompileOptions] = {"whitespace_flexible": False}
"""No space but what JSON needs: a model that may write spaces can write nothing else for ever."""
_LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=400_000,  # bytes of a schema's strings count, too
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_items_in_row=10_000,  # an object of 500 optional properties has 2,000
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
_LARK_LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=20_000,
    step_lexer_fuel=20_000,
    step_max_items=2_000,
    max_lexer_states=10_000,
    max_grammar_size=10_000,
    verbose_errors=False,
)
"""A stranger's grammar says in few characters what would be a long regular expression."""
_COMPILE_S: Final = 0.9
"""Twice as long as anything takes that is let through, as far as is known.  What takes longer goes
on for whoever asks again, and nothing else is compiled meanwhile: it burns one core at most."""
_FIRST_S: Final = 0.3
_PER_TOKEN_S: Final = 0.003
"""Time that an answer's masks may take: so much at once, for automata are made as they are needed,
and so much per token.  Schemas in use take a tenth of that with a vocabulary of 262,144."""
_MARKS: Final = re.compile(r"[^A-Za-z0-9]")
_REASON_CHARACTERS: Final = 300


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self._left_s = _FIRST_S
        self._error: str | None = None

    def copy(self) -> Matcher:
        """Another one that stands here; both share what was found out about the grammar."""
        return Matcher(self._matcher.deep_copy())

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str | None:
        """Why this grammar cannot be followed any further; None if it can."""
        if self._error is None and self._matcher.is_error():
            self._error = f"The constraint cannot be followed: {_reason(self._matcher)}."
        return self._error

    def fill(self, mask: torch.Tensor) -> None:
        """Set the bits of the tokens that may come next in an int32 row; none if it failed."""
        if self.error is None:
            began = time.thread_time()
            self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), 4 * mask.numel())
            self._spend(time.thread_time() - began)
        if self.error is not None:
            # llguidance would let the answer end here, as if it were whole.
            mask.zero_()

    def accept(self, token_id: int) -> bool:
        """Go on by this token; whether it was allowed, and more can be said of what follows."""
        began = time.thread_time()
        accepted = bool(self._matcher.consume_token(token_id))
        self._left_s += _PER_TOKEN_S
        self._spend(time.thread_time() - began)
        return accepted and self.error is None

    def _spend(self, seconds: float) -> None:
        self._left_s = min(_FIRST_S, self._left_s - seconds)
        if self._left_s < 0 and self._error is None:
            self._error = "The constraint takes too long to follow."


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What came of a constraint that makes no grammar."""

    reason: str


class _Making(threading.Thread):
    """A grammar in the making."""

    def __init__(
        self, key: tuple[Constraint, bool], make: Callable[[Constraint, bool], Any]
    ) -> None:
        super().__init__(daemon=True)
        self.key = key
        self.made: Any = _Refusal("The constraint cannot be used.")
        self._make = make

    def run(self) -> None:
        self.made = self._make(*self.key)


class ConstraintCompiler:
    """Constraints to matchers, for one tokenizer.  What came of the last ones is kept."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, eos_ids: Collection[int]) -> None:
        self._hf_tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = sorted(eos_ids)
        self._tokenizer: Any = None
        self._mask = torch.zeros(-(-vocabulary // 32), dtype=torch.int32)
        self._compiled: OrderedDict[tuple[Constraint, bool], Any] = OrderedDict()
        self._making: _Making | None = None
        """One that was given up."""
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Read the vocabulary: half a second that the first constraint would wait for."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    _without_marks(self._hf_tokenizer),
                    n_vocab=self._vocabulary,
                    eos_token=self._eos_ids or self._hf_tokenizer.eos_token_id,
                )

    def compile(self, constraint: Constraint, *, ours: bool = False) -> Matcher:
        """A matcher at its beginning; PromptRefused if this is no constraint that can be met,
        EngineBusy if another is in the way.

        `ours`: made here, of parts that were looked through, so its size is no sign of ill will.
        """
        self.warm_up()
        with self._lock:
            self._take_in()
            key = constraint, ours
            if key not in self._compiled:
                self._make(key)
            compiled = self._compiled[key]
            self._compiled.move_to_end(key)
        if isinstance(compiled, _Refusal):
            raise PromptRefused(compiled.reason)
        return Matcher(compiled.deep_copy())

    def _forget(self) -> None:
        characters = sum(len(constraint.text) for constraint, _ in self._compiled)
        while len(self._compiled) > _MAX_CACHED or characters > _MAX_CACHED_CHARACTERS:
            (oldest, _), _ = self._compiled.popitem(last=False)
            characters -= len(oldest.text)

    def _make(self, key: tuple[Constraint, bool]) -> None:
        """As `_new`, but given up when it takes too long; there is no way to break it off."""
        if self._making is None:
            self._making = _Making(key, self._new)
            self._making.start()
            self._making.join(_COMPILE_S)
            self._take_in()
        if self._making is not None:
            # Nobody waits for it a second time: whoever prepares requests would do nothing else.
            if self._making.key != key:
                raise EngineBusy("The engine is busy with another constraint.")
            raise PromptRefused("The constraint takes too long to make a grammar of.")

    def _take_in(self) -> None:
        """Keep what has been made."""
        if self._making is not None and not self._making.is_alive():
            self._compiled[self._making.key] = self._making.made
            self._making = None
            self._forget()

    def _new(self, constraint: Constraint, ours: bool) -> Any:  # noqa: FBT001 - as in a key
        strange = constraint.kind is ConstraintKind.LARK and not ours
        limits = _LARK_LIMITS if strange else _LIMITS
        try:
            _check_length(constraint, ours=ours)
            matcher = LLMatcher(self._tokenizer, _grammar(constraint), log_level=0, limits=limits)
        except UnicodeEncodeError:
            return _Refusal("The constraint cannot be used: half a surrogate pair is no text.")
        except (ValueError, RecursionError) as exc:
            return _Refusal(f"The constraint cannot be used: {exc}.")
        if not matcher.is_error():
            # The first mask tells whether there is any answer at all, and every copy shares it.
            matcher.unsafe_compute_mask_ptr(self._mask.data_ptr(), 4 * self._mask.numel())
        if matcher.is_error():
            return _Refusal(f"The constraint cannot be used: {_reason(matcher)}.")
        return matcher


def _without_marks(tokenizer: Any) -> str:
    """The tokenizer as a document, in which no text is a special token.

    Text that a grammar leaves no choice about is tokenised, and where it held "<|im_end|>" that
    would be the token, which ends the answer: so special tokens get names that nobody can guess.
    """
    backend = copy.copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    document = json.loads(backend.to_str())
    salt = secrets.token_hex(8)
    names = {}
    for token in document["added_tokens"]:
        if token["special"]:
            names[token["content"]] = f"<{salt}:{token['content']}>"
            token["content"] = names[token["content"]]
    model = document["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(name, name): number for name, number in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    document["post_processor"] = None
    return json.dumps(document, ensure_ascii=False)


def _reason(matcher: Any) -> str:
    """Why it failed, in one line."""
    text = str(matcher.get_error())
    if text.startswith("panic"):
        return "it is too large"
    if text.startswith("NoExtension"):
        return "no text matches it"
    if text.startswith("oneOf"):
        return '"oneOf" is held only where no two of its schemas can match the same'
    text = " ".join(text.replace("<non-verbose/>", "").split()).rstrip(". ")
    if len(text) <= _REASON_CHARACTERS:
        return text
    # The end of it says what is wrong; what is between quotes the constraint.
    half = _REASON_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"


def _check_length(constraint: Constraint, *, ours: bool) -> None:
    most = MAX_SOURCE_CHARACTERS
    if constraint.kind is ConstraintKind.REGEX:
        most = MAX_REGEX_CHARACTERS
    elif constraint.kind is ConstraintKind.LARK and not ours:
        most = MAX_LARK_CHARACTERS
    if len(constraint.text) > most:
        raise ValueError(f"it has {len(constraint.text)} characters; at most {most}")


def _grammar(constraint: Constraint) -> str:
    """In llguidance's own terms; ValueError if it is not even well formed."""
    match constraint.kind:
        case ConstraintKind.JSON_OBJECT:
            return _json_grammar({"type": "object"})
        case ConstraintKind.JSON_SCHEMA:
            return _json_grammar(schema.read_untrusted(constraint.text))
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(constraint.text)
        case ConstraintKind.CHOICE:
            # One automaton: of as many rules, each would be a row of its own in every step.
            words = "|".join(map(_literally, _choices(constraint.text)))
            return LLMatcher.grammar_from_regex(words)
        case ConstraintKind.LARK:
            return LLMatcher.grammar_from_lark(constraint.text)


def _json_grammar(document: dict[str, Any]) -> str:
    text = json.dumps(document | {"x-guidance": _JSON_OPTIONS}, ensure_ascii=False)
    text.encode()  # which llguidance would say in other words
    return LLMatcher.grammar_from_json_schema(text)


def _choices(text: str) -> list[str]:
    try:
        choices = json.loads(text)
    except RecursionError:
        choices = None
    if not isinstance(choices, list) or not choices:
        raise ValueError("a choice is a list of strings")
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"it has {len(choices)} choices; at most {MAX_CHOICES}")
    for choice in choices:
        if not isinstance(choice, str):
            raise ValueError("a choice is a list of strings")  # noqa: TRY004 - a value of theirs
        if len(choice) > schema.MAX_LITERAL:
            raise ValueError(f"a choice has {len(choice)} characters; at most {schema.MAX_LITERAL}")
    return choices


def _literally(text: str) -> str:
    """As a regular expression."""
    return _MARKS.sub(lambda mark: f"\\x{{{ord(mark[0]):x}}}", text)
