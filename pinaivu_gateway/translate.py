"""OpenAI's requests to orders for the market."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from typing import Final

from pinaivu_gateway.errors import refusal
from pinaivu_gateway.jobs import JobOrder, ProviderView
from pinaivu_gateway.openai_schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    MaxPrice,
    OtherPart,
    TextPart,
)
from pinaivu_gateway.response_format import constraint_of
from pinaivu_gateway.tools import most_tokens_of_calls, most_tokens_of_tools, wire_calls
from pinaivu_node.models.variants import pinned_digest
from pinaivu_node.protocol.ids import (
    MAX_SAFE_INTEGER,
    Milliseconds,
    ModelName,
    NanoX,
    RequestId,
)
from pinaivu_node.protocol.inference import (
    MAX_PROMPT_CHARACTERS,
    ChatTurn,
    Prompt,
    Sampling,
    ToolUse,
)
from pinaivu_node.protocol.market import JobKind, Preference
from pinaivu_node.protocol.money import PriceList

TOKENS_PER_MESSAGE: Final = 32
"""A template's marks around a message; a few tokens in every template known."""
TOKENS_PER_PROMPT: Final = 64
"""Beginning of text, the opening of the answer, and a default system message."""
SHORT_ANSWER: Final = 256
"""Answers are estimated at this: clients ask for much more than models say."""
DEFAULT_COMPLETION_TOKENS: Final = 16
"""OpenAI's, for raw completions."""
NANO_X_PER_X: Final = 10**9
_MOST_TOKENS: Final = 1_000_000
"""Of all answers to a prompt: the wire's own bound."""


@dataclass(frozen=True, slots=True)
class Chance:
    """What is drawn for a request."""

    request_id: RequestId
    nonce: bytes
    seed: int
    """Used where the client names none."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the gateway adds to a request."""

    default_output_tokens: int
    context_window: int | None
    """The model's, as far as the roster knows."""
    deadline_in: Milliseconds
    tenant: bytes
    fingerprints: tuple[bytes, ...] = ()


def chat_turns(messages: Sequence[ChatMessage]) -> tuple[ChatTurn, ...]:
    """The turns of a chat, as chat templates want them.

    `developer` is a system message, and there is one of those at most, at the beginning: most
    templates fail at a second or a late one.
    """
    system: list[str] = []
    turns: list[ChatTurn] = []
    for index, message in enumerate(messages):
        text = _text_of(message, f"messages[{index}]")
        if message.role in ("system", "developer"):
            system.append(text)
        else:
            role = "tool" if message.role == "function" else message.role
            calls = wire_calls(message.tool_calls if role == "assistant" else ())
            answers = message.tool_call_id if role == "tool" else ""
            turns.append(ChatTurn(role=role, content=text, tool_calls=calls, tool_call_id=answers))
    if system:
        turns.insert(0, ChatTurn(role="system", content="\n\n".join(system)))
    return tuple(turns)


def _text_of(message: ChatMessage, path: str) -> str:
    if message.function_call not in (None, []):
        raise refusal(
            f"Unsupported parameter: '{path}.function_call' is not supported by this network.",
            code="unsupported_parameter",
            param=f"{path}.function_call",
        )
    content = message.content
    if content is None:
        if message.role == "assistant" and message.tool_calls:
            return message.refusal or ""
        if message.role == "assistant" and message.refusal is not None:
            return message.refusal
        raise refusal(
            f"Missing required parameter: '{path}.content'.",
            code="missing_required_parameter",
            param=f"{path}.content",
        )
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, OtherPart):
            raise refusal(
                f"Unsupported content type '{part.type[:40]}': models here read text only.",
                code="unsupported_value",
                param=f"{path}.content[{index}]",
            )
        texts.append(part.text if isinstance(part, TextPart) else part.refusal)
    return "".join(texts)


def chat_order(
    request: ChatRequest,
    turns: tuple[ChatTurn, ...],
    chance: Chance,
    limits: Limits,
    *,
    tools: ToolUse | None = None,
) -> JobOrder:
    """The order for a chat; its turns and tools come apart, as fingerprints are made of them."""
    size = sum(len(turn.content.encode()) for turn in turns)
    most = most_tokens_of_tools(tools)
    most += sum(most_tokens_of_calls(turn.tool_calls) for turn in turns)
    _check_size(size + most, "messages")
    return _order(
        request,
        Prompt(nonce=chance.nonce, turns=turns, tools=tools),
        chance,
        limits,
        # A token covers at least one byte of text, so there cannot be more of them.
        input_limit=size + most + TOKENS_PER_MESSAGE * len(turns) + TOKENS_PER_PROMPT,
        # Of spelled-out tools, half is space and brackets, of which a token covers many.
        input_estimate=size // 4 + most // 8 + 8 * len(turns) + 16,
    )


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a raw completion, each text or token ids, each to be a job of its own."""
    match request.prompt:
        case str() as text:
            return [text]
        case [int(), *_] as ids:
            return [[token for token in ids if isinstance(token, int)]]
        case prompts:
            return [prompt for prompt in prompts if not isinstance(prompt, int)]


def completion_order(
    request: CompletionRequest, prompt: str | Sequence[int], chance: Chance, limits: Limits
) -> JobOrder:
    """The order for one prompt of a raw completion."""
    if isinstance(prompt, str):
        return _text_order(request, prompt, chance, limits)
    return _ids_order(request, prompt, chance, limits)


def _text_order(request: CompletionRequest, text: str, chance: Chance, limits: Limits) -> JobOrder:
    size = len(text.encode())
    _check_size(size, "prompt")
    prompt = Prompt(nonce=chance.nonce, text=text)
    return _order(
        request,
        prompt,
        chance,
        limits,
        input_limit=size + TOKENS_PER_PROMPT,
        input_estimate=size // 4 + 16,
    )


def _ids_order(
    request: CompletionRequest, ids: Sequence[int], chance: Chance, limits: Limits
) -> JobOrder:
    prompt = Prompt(nonce=chance.nonce, token_ids=tuple(ids))
    return _order(
        request,
        prompt,
        chance,
        limits,
        input_limit=len(ids) + TOKENS_PER_PROMPT,
        input_estimate=len(ids) + 1,
    )


def _check_size(size: int, param: str) -> None:
    if size > MAX_PROMPT_CHARACTERS:
        raise refusal(
            f"Invalid '{param}': {size} bytes of text are over the limit of "
            f"{MAX_PROMPT_CHARACTERS}.",
            code="string_above_max_length",
            param=param,
        )


def _order(
    request: ChatRequest | CompletionRequest,
    prompt: Prompt,
    chance: Chance,
    limits: Limits,
    *,
    input_limit: int,
    input_estimate: int,
) -> JobOrder:
    each = _output_limit(request, limits, input_estimate)
    output_limit = request.n * each
    wishes = request.provider
    return JobOrder(
        request_id=chance.request_id,
        kind=JobKind.CHAT if isinstance(request, ChatRequest) else JobKind.COMPLETION,
        model=ModelName(request.model),
        prompt=prompt,
        sampling=_sampling(request, each, chance.seed),
        input_limit=input_limit,
        input_estimate=input_estimate,
        output_limit=output_limit,
        output_estimate=request.n * min(each, SHORT_ANSWER),
        deadline_in=limits.deadline_in,
        preference=Preference(wishes.sort),
        max_prices=price_ceiling(wishes.max_price) if wishes.max_price else None,
        allow=None if wishes.allow is None else tuple(wishes.allow),
        deny=tuple(wishes.deny),
        fingerprints=limits.fingerprints,
        tenant=limits.tenant,
        model_digest=pinned_digest(ModelName(request.model)),
    )


def _output_limit(
    request: ChatRequest | CompletionRequest, limits: Limits, input_estimate: int
) -> int:
    asked: int | None
    if isinstance(request, ChatRequest):
        asked = request.max_completion_tokens or request.max_tokens or limits.default_output_tokens
    else:
        asked = request.max_tokens or DEFAULT_COMPLETION_TOKENS
    if limits.context_window is None:
        return min(asked, _MOST_TOKENS // request.n)  # the engine stops at the window anyway
    # Many clients ask for the whole window, which no provider could sell beside the prompt.
    most = min(limits.context_window - input_estimate, _MOST_TOKENS // request.n)
    return min(asked, max(1, most))


def _sampling(request: ChatRequest | CompletionRequest, output_limit: int, seed: int) -> Sampling:
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return Sampling(
        max_tokens=output_limit,
        temperature=float(request.temperature),
        top_p=float(request.top_p),
        top_k=max(0, request.top_k),  # −1 is another server's word for "all"
        min_p=float(request.min_p),
        presence_penalty=float(request.presence_penalty),
        frequency_penalty=float(request.frequency_penalty),
        repetition_penalty=float(request.repetition_penalty),
        logit_bias=tuple(sorted((key, float(bias)) for key, bias in request.logit_bias.items())),
        stop=stop,
        seed=seed if request.seed is None else request.seed,
        ignore_eos=request.ignore_eos,
        n=request.n,
        logprobs=_logprobs(request),
        constraint=(
            constraint_of(request.response_format) if isinstance(request, ChatRequest) else None
        ),
    )


def _logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    return request.top_logprobs if request.logprobs else None


def price_ceiling(wish: MaxPrice) -> PriceList:
    """X per million tokens, exactly as written, to whole NanoX; rounded down, never above it.

    Warm prompt tokens may cost as much as others: the wish is about the prompt.
    """
    prompt, completion = (
        NanoX(
            min(
                int((Decimal(str(amount)) * NANO_X_PER_X).to_integral_value(ROUND_FLOOR)),
                MAX_SAFE_INTEGER,
            )
        )
        for amount in (wish.prompt, wish.completion)
    )
    return PriceList(input=prompt, cached_input=prompt, output=completion)


def context_window_of(providers: Sequence[ProviderView], model: str) -> int | None:
    """The largest window in which anyone serves this model; None if nobody does."""
    windows = [
        offer.context_window
        for provider in providers
        for offer in provider.models
        if offer.model == model
    ]
    return max(windows, default=None)
