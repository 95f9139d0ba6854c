"""Everything that can go wrong, as OpenAI's error object: status, type, code, param, headers.

The tables are looked up along an error's `__mro__`.  Messages hold the words by which client
libraries recognise an error, since they show their users nothing else.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Final

from pinaivu_gateway import jobs

INVALID: Final = "invalid_request_error"
SERVER: Final = "server_error"
LONGEST_RETRY_AFTER: Final = 120
"""Seconds; OpenAI's SDK does not retry at all when it is told to wait longer."""
LONGEST_MESSAGE: Final = 1000
"""Some messages quote a provider's explanation or the client's own words."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What the client is told."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    type: str = INVALID
    headers: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """OpenAI's error object: all four keys, each a string or null."""
        return {
            "error": {
                "message": self.message[:LONGEST_MESSAGE],
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def as_body(self) -> bytes:
        """The body of the answer."""
        return json.dumps(self.as_json()).encode()


class RequestRefused(Exception):
    """The request ends here; `problem` is its whole answer."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refusal(message: str, *, code: str | None, param: str | None) -> RequestRefused:
    """A 400: the client's request is at fault, at `param`."""
    return RequestRefused(Problem(400, message, code, param))


@dataclass(frozen=True, slots=True)
class _Rule:
    status: int
    code: str
    type: str = SERVER
    param: str | None = None
    retry_after: int | None = None
    """Seconds, where the error itself names no time."""
    headers: tuple[tuple[str, str], ...] = ()


_RULES: Final[dict[type[jobs.JobError], _Rule]] = {
    jobs.JobError: _Rule(502, "upstream_error"),
    jobs.UnknownModel: _Rule(404, "model_not_found", INVALID, "model"),
    jobs.NoBids: _Rule(503, "no_bids", retry_after=1),
    # 400 and not 503: the client's own filter left nobody, and a retry would leave nobody again.
    jobs.NobodyEligible: _Rule(400, "no_provider_matches", INVALID, "provider"),
    jobs.NoCredit: _Rule(
        402, "insufficient_quota", "insufficient_quota", headers=(("x-should-retry", "false"),)
    ),
    jobs.Overloaded: _Rule(503, "server_is_overloaded", retry_after=2),
    jobs.JobInvalid: _Rule(400, "invalid_value", INVALID),
    jobs.CoordinatorUnreachable: _Rule(502, "coordinator_unreachable", retry_after=2),
    jobs.ProvidersFailed: _Rule(502, "providers_failed", retry_after=1),
    jobs.PromptTooLong: _Rule(400, "context_length_exceeded", INVALID),
    jobs.PromptNotAccepted: _Rule(400, "prompt_not_accepted", INVALID),
    jobs.DeadlinePassed: _Rule(504, "timeout"),
    jobs.StreamBroken: _Rule(502, "provider_lost"),
}
_ABOUT_THE_PROMPT: Final = (jobs.PromptTooLong, jobs.PromptNotAccepted)
CONTEXT_PHRASE: Final = "This model's maximum context length is"


@dataclass(frozen=True, slots=True)
class Asked:
    """What of the request an explanation may quote."""

    model: str
    prompt_param: str
    """`messages` or `prompt`."""
    context_window: int | None = None


def problem_of(error: jobs.JobError, asked: Asked) -> Problem:
    """A job's error, as its client is told."""
    rule = next(_RULES[each] for each in type(error).__mro__ if each in _RULES)
    headers = dict(rule.headers)
    seconds = rule.retry_after
    if error.retry_after_ms is not None:
        seconds = min(max(1, math.ceil(error.retry_after_ms / 1000)), LONGEST_RETRY_AFTER)
    if seconds is not None:
        headers["retry-after"] = str(seconds)
    return Problem(
        status=rule.status,
        message=_message(error, asked),
        code=rule.code,
        param=asked.prompt_param if isinstance(error, _ABOUT_THE_PROMPT) else rule.param,
        type=rule.type,
        headers=headers,
    )


def unknown_model(model: str) -> Problem:
    """The words that agents and routers recognise."""
    shown = model if len(model) <= 100 else model[:100] + "…"
    return Problem(
        404,
        f"The model `{shown}` does not exist or you do not have access to it.",
        "model_not_found",
        "model",
    )


def context_exceeded(
    detail: str, *, param: str, window: int | None, code: str = "context_length_exceeded"
) -> Problem:
    """LiteLLM knows it by the beginning of the message, LangChain by the end."""
    size = f"{window} tokens" if window is not None else "smaller than this"
    message = (
        f"{CONTEXT_PHRASE} {size}. However, your {param} resulted in more tokens: "
        f"{detail[:300].rstrip('.')}. Please reduce the length of the {param}. "
        "(context_length_exceeded)"
    )
    return Problem(400, message, code, param)


def _message(error: jobs.JobError, asked: Asked) -> str:
    said = str(error) or type(error).__name__
    match error:
        case jobs.UnknownModel():
            return unknown_model(asked.model).message
        case jobs.PromptTooLong() if CONTEXT_PHRASE not in said:
            found = context_exceeded(said, param=asked.prompt_param, window=asked.context_window)
            return found.message
        case jobs.NoCredit():
            return (
                f"{said.rstrip('.')}. The gateway's account at the coordinator cannot cover this "
                "request (insufficient_quota): lower max_tokens or provider.max_price, or ask the "
                "gateway's operator to deposit credit."
            )
        case _:
            return said


BUG: Final = Problem(
    500, "The server had an error while processing your request.", "internal_error", None, SERVER
)
"""Nothing of the traceback: it is in the log, under the request id."""
CLOSE: Final = {"connection": "close"}
NO_KEY: Final = Problem(
    401,
    "You didn't provide an API key. Send it as `Authorization: Bearer sk-pnv-…`.",
    headers={"www-authenticate": "Bearer"},
)
WRONG_KEY: Final = Problem(
    401,
    "Incorrect API key provided: it is unknown here or was revoked.",
    "invalid_api_key",
    headers={"www-authenticate": "Bearer"},
)
NOT_JSON: Final = "We could not parse the JSON body of your request"
STOPPING: Final = Problem(
    503,
    "The gateway is shutting down.",
    "server_is_overloaded",
    None,
    SERVER,
    {"retry-after": "2"},
)


def http_problem(status: int, *, method: str, path: str, headers: dict[str, str]) -> Problem:
    """What the router says: no such route, or not with this method."""
    shown = path if len(path) <= 100 else path[:100] + "…"
    words = {
        404: f"Unknown request URL: {method} {shown}. Please check the URL for typos.",
        405: f"Not allowed to {method} on {shown}.",
    }
    return Problem(status, words.get(status, "The request cannot be served."), headers=headers)
