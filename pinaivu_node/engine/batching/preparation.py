"""A request to answers that can be scheduled: tokenised, checked, its grammar compiled.

All of it may take long for a large or hostile request, so it happens on a thread of its own while
the batch goes on.
"""

from __future__ import annotations

import secrets
import traceback
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Final

from pinaivu_node.engine.batching.answer import Answer, Ending
from pinaivu_node.engine.batching.lookup import PromptLookup
from pinaivu_node.engine.batching.sequence import Sequence
from pinaivu_node.engine.chat.prompts import PromptEncoder
from pinaivu_node.engine.chat.text import AnswerText, ByteDetokenizer, WindowDetokenizer
from pinaivu_node.engine.chat.token_bytes import TokenBytes
from pinaivu_node.engine.frames import RefusalKind, Refused
from pinaivu_node.engine.limits import check_request
from pinaivu_node.engine.model.loading import LoadedModel, LoadError
from pinaivu_node.engine.sampling import noise, schema
from pinaivu_node.engine.sampling.constraint import ConstraintCompiler, Matcher
from pinaivu_node.engine.sampling.sampler import SequenceSampling
from pinaivu_node.engine.types import (
    EngineBusy,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
    Tool,
    ToolChoice,
    ToolUse,
)

_CONTEXT_TOKENS: Final = 4
"""End of the prompt that a detokenizer sees: enough for a leading space or a split character."""
_REASON_CHARACTERS: Final = 1000


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be run."""

    request: GenerationRequest
    answers: tuple[Answer, ...]
    input_tokens: int


class Preparation:
    """What turns requests into answers, for one model.  Not for two threads at once."""

    def __init__(self, model: LoadedModel, *, speculates: bool = False) -> None:
        """`speculates`: answers guess at their next tokens (see `lookup.py`)."""
        self._model = model
        self._speculates = speculates
        self._vocabulary = TokenBytes(model.tokenizer)
        self._encoder = PromptEncoder(
            model.tokenizer,
            random_word=lambda: "p" + secrets.token_hex(16),
            max_tokens=model.context_window,
        )
        self._compiler = ConstraintCompiler(
            model.tokenizer, vocabulary=model.vocabulary, eos_ids=model.eos_ids
        )

    def warm_up(self) -> None:
        """Make what the first constraint would wait for."""
        self._compiler.warm_up()

    def warm_up_answer(self, *, tokens: int = 8) -> Prepared:
        """A short request, to find out how fast this model is."""
        request = GenerationRequest(
            id="warm-up",
            prompt=tuple([min(100, self._model.vocabulary - 1)] * 16),
            sampling=SamplingParams(max_tokens=tokens, temperature=0.7, ignore_eos=True),
        )
        prepared = self.prepare(request)
        if isinstance(prepared, Refused):
            raise LoadError(f"this model cannot answer: {prepared.reason}")
        return prepared

    def prepare(self, request: GenerationRequest) -> Prepared | Refused:
        """The request's answers, or the reason why there are none.  Raises nothing, whatever the
        request: the thread that would end by it prepares everybody's.
        """
        try:
            check_request(request, vocabulary=self._model.vocabulary)
            prompt = self._encoder.encode(request.prompt, request.tools)
            self._check_length(request, prompt)
            matcher = self._matcher(request)
            answers = tuple(
                self._answer(request, prompt, index, None if matcher is None else matcher.copy())
                for index in range(request.sampling.n)
            )
        except PromptRefused as exc:
            return _refused(request, str(exc))
        except EngineBusy as exc:
            return _refused(request, str(exc), RefusalKind.FULL)
        except BaseException as exc:  # noqa: BLE001 - the per-request edge; Rust's panic is no Exception
            traceback.print_exc()
            return _refused(request, f"It cannot be prepared: {type(exc).__name__}.")
        return Prepared(request, answers, len(prompt))

    def _check_length(self, request: GenerationRequest, prompt: Ids[int]) -> None:
        window = self._model.context_window
        for token_id in prompt:
            # An index beyond the weights is an exception on a CPU, the end of the process on CUDA.
            if not 0 <= token_id < self._model.vocabulary:
                raise PromptRefused(f"Token id {token_id} is not in the model's vocabulary.")
        # The answer needs room for one token at least.
        given = len(prompt) + len(request.resume_token_ids)
        if given >= window:
            raise PromptRefused(too_long(window, given))

    def _answer(
        self, request: GenerationRequest, prompt: Ids[int], index: int, matcher: Matcher | None
    ) -> Answer:
        params = request.sampling
        model = self._model
        stop_ids = frozenset(params.stop_token_ids)
        sequence = Sequence(list(prompt), tenant=request.tenant)
        if not params.ignore_eos or matcher is not None:
            stop_ids |= model.eos_ids
        return Answer(
            request,
            index=index,
            sequence=sequence,
            sampling=SequenceSampling(
                params,
                seed=noise.answer_seed(params.seed, index),
                prompt=prompt,
                answer=(),
                vocabulary=model.vocabulary,
                device=model.device,
            ),
            text=self._text(request, prompt),
            ending=Ending(stop_ids, min(model.context_window, len(prompt) + params.max_tokens)),
            vocabulary=self._vocabulary,
            parser=self._encoder.dialect.parser(request.tools, request_id=request.id, answer=index),
            matcher=matcher,
            lookup=PromptLookup(sequence.tokens) if self._speculates else None,
        )

    def _matcher(self, request: GenerationRequest) -> Matcher | None:
        if request.constraint is not None:
            return self._compiler.compile(request.constraint)
        return None if request.tools is None else self._calls(request.tools)

    def _calls(self, tools: ToolUse) -> Matcher | None:
        try:
            for tool in tools.tools:
                _check_schema(tool)
            constraint = self._encoder.dialect.constraint(tools)
            return None if constraint is None else self._compiler.compile(constraint, ours=True)
        except PromptRefused:
            if tools.choice is ToolChoice.AUTO:  # a call is then hoped for, as everywhere else
                return None
            raise

    def _text(self, request: GenerationRequest, prompt: Ids[int]) -> AnswerText:
        stops = request.sampling.stop
        if self._vocabulary.composable:
            visible = self._encoder.dialect.visible(request.tools)
            return AnswerText(ByteDetokenizer(self._vocabulary, visible=visible), stops=stops)
        before = prompt[-_CONTEXT_TOKENS:]
        return AnswerText(WindowDetokenizer(self._decode, before=before), stops=stops)

    def _decode(self, token_ids: Ids[int]) -> str:
        text = self._model.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def _refused(
    request: GenerationRequest, reason: str, kind: RefusalKind = RefusalKind.REQUEST
) -> Refused:
    # A template may quote a chat, and JSON in it half a surrogate pair, which no frame takes.
    return Refused(request.id, reason[:_REASON_CHARACTERS].encode(errors="replace").decode(), kind)


def _check_schema(tool: Tool) -> None:
    try:
        schema.read_untrusted(tool.parameters)
    except ValueError as exc:
        reason = f"The parameters of {tool.name} cannot be used: {exc}."
        raise PromptRefused(reason) from exc


def too_long(window: int, tokens: int) -> str:
    """The words that OpenAI's clients recognise."""
    return (
        f"This model's maximum context length is {window} tokens. "
        f"However, your messages resulted in {tokens} tokens."
    )
