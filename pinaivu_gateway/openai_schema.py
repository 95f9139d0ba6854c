"""Requests of OpenAI's API as far as offered; what is not offered is refused, never ignored.

`parse_untrusted` is the one door.  Null means the default; a bool is no number; unknown extras,
which many clients send, are ignored, but not inside `provider`, which is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)

from pinaivu_gateway.errors import NOT_JSON, RequestRefused, refusal, unknown_model
from pinaivu_gateway.openai_struct import Struct, without_halves
from pinaivu_gateway.response_format import ResponseFormat
from pinaivu_gateway.tools import CallId, Choice, MessageCalls, Tools
from pinaivu_node.protocol.ids import PeerIdField, TokenId, is_model_name
from pinaivu_node.protocol.inference import (
    MAX_ALTERNATIVES,
    MAX_ANSWERS,
    MAX_PROMPT_CHARACTERS,
)

MAX_MESSAGES: Final = 4096
"""As many turns as a prompt may have on the wire."""
MAX_PROMPTS: Final = 32
"""Of one raw completion: each is a job, with an auction and a receipt of its own."""
MAX_PEERS: Final = 1024
MAX_PROMPT_TOKENS: Final = 1 << 17


def _shape(value: object) -> str:
    return "~text" if isinstance(value, str) else "~list"


Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS), BeforeValidator(without_halves)]
Stop = Annotated[str, Field(min_length=1, max_length=1024), BeforeValidator(without_halves)]
Label = Annotated[str, Field(max_length=512)]


class TextPart(Struct):
    """Part of a message."""

    type: Literal["text"]
    text: Text


class RefusalPart(Struct):
    """What an assistant said instead of an answer; part of a history."""

    type: Literal["refusal"]
    refusal: Text


class OtherPart(Struct):
    """An image, audio or a file, which is refused by name; or nonsense."""

    type: str


def _part_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"~{kind}" if kind in ("text", "refusal") else "~other"


Part = Annotated[
    Annotated[TextPart, Tag("~text")]
    | Annotated[RefusalPart, Tag("~refusal")]
    | Annotated[OtherPart, Tag("~other")],
    Discriminator(_part_kind),
]
Content = Annotated[
    Annotated[Text, Tag("~text")]
    | Annotated[list[Part], Field(min_length=1, max_length=MAX_MESSAGES), Tag("~list")],
    Discriminator(_shape),
]


class ChatMessage(Struct):
    """One message; `function_call` only to be refused."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    refusal: Text | None = None
    tool_calls: MessageCalls = Field(default_factory=list)
    tool_call_id: CallId = ""
    function_call: Any = None


Amount = Annotated[
    Annotated[float, Field(ge=0), Tag("~number")]
    | Annotated[str, Field(max_length=40, pattern=r"^[0-9]{1,20}(\.[0-9]{1,18})?$"), Tag("~text")],
    Discriminator(lambda value: "~text" if isinstance(value, str) else "~number"),
]


class MaxPrice(Struct):
    """X per million tokens.  Both, since the network's own ceiling stands only where neither is."""

    model_config = ConfigDict(extra="forbid")

    prompt: Amount
    completion: Amount


class ProviderPreferences(Struct):
    """Who may serve the request, and for how much."""

    model_config = ConfigDict(extra="forbid")

    sort: Literal["price", "balanced", "latency"] = "balanced"
    max_price: MaxPrice | None = None
    allow: Annotated[list[PeerIdField], Field(max_length=MAX_PEERS)] | None = None
    deny: Annotated[list[PeerIdField], Field(max_length=MAX_PEERS)] = Field(default_factory=list)


class StreamOptions(Struct):
    """`include_obfuscation` is accepted and has no effect: there is nothing to obfuscate."""

    include_usage: bool = False
    include_obfuscation: bool = False


def _token_ids(value: Any) -> Any:
    """JSON's keys are strings; a token id among them is plain digits."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError("keys are token ids, as strings of digits")
    return {int(key): bias for key, bias in value.items()}


class _Generation(Struct):
    """What both endpoints share."""

    model: Annotated[str, Field(min_length=1), BeforeValidator(without_halves)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=1024),
        BeforeValidator(_token_ids),
    ] = Field(default_factory=dict)
    stop: (
        Annotated[
            Annotated[Stop, Tag("~text")]
            | Annotated[list[Stop], Field(max_length=4), Tag("~list")],
            Discriminator(_shape),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    user: Label | None = None
    provider: ProviderPreferences = ProviderPreferences()
    # Extras of other servers that our engines know as well.
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    ignore_eos: bool = False


class ChatRequest(_Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools = Field(default_factory=list)
    tool_choice: Choice | None = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] = 0
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    store: bool = False
    service_tier: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    reasoning_effort: Label | None = None
    verbosity: Label | None = None


TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]


def _prompt_shape(value: object) -> str:
    if isinstance(value, list):
        first = value[0] if value else ""
        return "~" + {int: "ids", list: "lists"}.get(type(first), "texts")
    return "~text"


class CompletionRequest(_Generation):
    """`POST /v1/completions`: raw text or token ids, no chat template."""

    prompt: Annotated[
        Annotated[Text, Tag("~text")]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS), Tag("~texts")]
        | Annotated[TokenIds, Tag("~ids")]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag("~lists")],
        Discriminator(_prompt_shape),
    ]
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None


R = TypeVar("R", bound=_Generation)

# What is refused, unless its value asks for nothing or the endpoint offers it: parameter → whether
# it asks for nothing.
_NOT_OFFERED: Final[Mapping[str, Callable[[Any], bool]]] = {
    "tools": lambda value: value == [],
    "functions": lambda value: value == [],
    "tool_choice": lambda value: value in ("none", "auto"),
    "function_call": lambda value: value in ("none", "auto"),
    "response_format": lambda value: value == {"type": "text"},
    "modalities": lambda value: value == ["text"],
    "top_logprobs": lambda value: value == 0,
    "audio": lambda _: False,
    "prediction": lambda _: False,
    "web_search_options": lambda _: False,
    "moderation": lambda _: False,
    "echo": lambda value: value is False,
    "suffix": lambda value: value == "",
    "best_of": lambda value: value == 1,
}
_OFFERED: Final[Mapping[type[_Generation], frozenset[str]]] = {
    ChatRequest: frozenset({"response_format", "top_logprobs", "tools", "tool_choice"}),
    CompletionRequest: frozenset({"echo", "best_of"}),
}
_WITH_OTHER_VALUES: Final = frozenset({"response_format", "modalities", "best_of"})
"""Parameters that are understood, though not with that value."""


def parse_untrusted(body: bytes, kind: type[R]) -> R:
    """The request in these bytes, or RequestRefused with the parameter at fault."""
    fields = _json_untrusted(body)
    if not isinstance(fields, dict):
        raise refusal(f"{NOT_JSON}: it must be an object.", code=None, param=None)
    try:
        request = kind.model_validate(fields)
    except ValidationError as exc:
        raise _translated(exc) from None
    except RecursionError:
        raise refusal(f"{NOT_JSON}: it is nested too deeply.", code=None, param=None) from None
    _refuse_what_is_not_offered(fields, _OFFERED[kind])
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise refusal(
            "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.",
            code="invalid_value",
            param="top_logprobs",
        )
    if isinstance(request, CompletionRequest):
        _refuse_what_completions_cannot(request)
    if request.stream_options is not None and not request.stream:
        raise refusal(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
            code="invalid_value",
            param="stream_options",
        )
    if not is_model_name(request.model):
        raise RequestRefused(unknown_model(request.model))
    return request


def _refuse_what_completions_cannot(request: CompletionRequest) -> None:
    if request.best_of not in (None, request.n):
        raise refusal(
            "Unsupported value: 'best_of' must be equal to 'n': every answer that is paid for is "
            "given, and none is chosen for you.",
            code="unsupported_value",
            param="best_of",
        )
    first = request.prompt[0] if isinstance(request.prompt, list) else request.prompt
    if request.echo and not isinstance(first, str):
        raise refusal(
            "Unsupported value: 'echo' needs a prompt of text; the gateway has no tokenizer.",
            code="unsupported_value",
            param="echo",
        )
    if request.echo and request.logprobs is not None:
        raise refusal(
            "Unsupported value: 'echo' cannot be combined with 'logprobs': the engine reports "
            "those of the answer only.",
            code="unsupported_value",
            param="echo",
        )


def _json_untrusted(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=_no_such_number)
    except RecursionError:
        reason = "it is nested too deeply"
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except json.JSONDecodeError as exc:
        reason = f"{exc.msg} at line {exc.lineno} column {exc.colno}"
    except ValueError as exc:
        # An integer of thousands of digits, or NaN.
        reason = "a number is out of range" if "digits" in str(exc) else str(exc)
    raise refusal(f"{NOT_JSON}: {reason}.", code=None, param=None)


def _no_such_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _refuse_what_is_not_offered(fields: dict[str, Any], offered: frozenset[str]) -> None:
    for name, asks_nothing in _NOT_OFFERED.items():
        value = fields.get(name)
        if value is None or name in offered or asks_nothing(value):
            continue
        is_known = name in _WITH_OTHER_VALUES
        raise refusal(
            f"Unsupported {'value' if is_known else 'parameter'}: '{name}' is not supported "
            f"{'with this value ' if is_known else ''}by this network yet.",
            code="unsupported_value" if is_known else "unsupported_parameter",
            param=name,
        )


_CODES: Final = {
    "missing": "missing_required_parameter",
    "too_long": "array_above_max_length",
    "too_short": "empty_array",
    "string_too_long": "string_above_max_length",
    "string_too_short": "invalid_value",
    "extra_forbidden": "unknown_parameter",
    "literal_error": "invalid_value",
    "value_error": "invalid_value",
    "string_pattern_mismatch": "invalid_value",
    "finite_number": "invalid_value",
}
_BOUNDS: Final = {
    "greater_than": "below_min_value",
    "greater_than_equal": "below_min_value",
    "less_than": "above_max_value",
    "less_than_equal": "above_max_value",
}


def _translated(exc: ValidationError) -> RequestRefused:
    """The first fault, as OpenAI words it; pydantic's own words and URLs stay here."""
    fault = exc.errors(include_url=False, include_input=True)[0]
    param = path_of(fault["loc"])
    kind = fault["type"]
    if kind in _BOUNDS:
        number = "integer" if isinstance(fault["input"], int) else "decimal"
        code = f"{number}_{_BOUNDS[kind]}"
    else:
        code = _CODES.get(kind, "invalid_type")
    if kind == "missing":
        return refusal(f"Missing required parameter: '{param}'.", code=code, param=param)
    if kind == "extra_forbidden":
        return refusal(f"Unknown parameter: '{param}'.", code=code, param=param)
    said = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    said = said.replace(" after validation", "")
    return refusal(
        f"Invalid '{param}': {said[:1].lower()}{said[1:]}."[:500], code=code, param=param
    )


def path_of(parts: tuple[int | str, ...]) -> str:
    """`messages[2].content[0].type`: a fault's place as OpenAI writes it."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]" and not part.startswith("~"):  # pydantic's name, and ours for unions
            path += f".{part}" if path else part
    return path[:200]


__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "MaxPrice",
    "OtherPart",
    "ProviderPreferences",
    "RefusalPart",
    "TextPart",
    "parse_untrusted",
    "path_of",
]
