"""Whether to run what a gateway dispatched: the token is the only right it has to our engine.

Pure.  The checks go from what costs nothing to what costs a hash of the whole prompt, so that a
stranger cannot make us work by sending rubbish.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Final

from pinaivu_node.protocol.errors import PeerAction, RemoteProtocolError
from pinaivu_node.protocol.ids import ModelName, PeerId, RequestId, UnixMilliseconds
from pinaivu_node.protocol.inference import ChatTurn, Dispatch, Prompt, Refuse, RefuseReason
from pinaivu_node.protocol.market import DispatchToken, JobKind
from pinaivu_node.protocol.signing import open_untrusted
from pinaivu_node.provider.shelf import Stock

FORGED: Final = frozenset(
    {
        RefuseReason.MALFORMED_TOKEN,
        RefuseReason.WRONG_SIGNER,
        RefuseReason.OTHER_PROVIDER,
        RefuseReason.OTHER_GATEWAY,
        RefuseReason.WRONG_INPUT,
        RefuseReason.WRONG_SAMPLING,
    }
)
"""No honest gateway gets one of these but by a bug; one that goes on getting them is cut off."""


@dataclass(frozen=True, slots=True)
class Doorkeeper:
    """What a dispatch is checked against, as known when it comes."""

    me: PeerId
    coordinator: PeerId
    stock: Mapping[ModelName, Stock]
    used: Container[RequestId]
    """Requests whose token was used and could pass the check of its times again."""
    first_issue: UnixMilliseconds
    """When this daemon first heard from the coordinator, on the coordinator's clock.  A restart
    forgets which tokens were used; they live some seconds only and none that is meant for this
    life of the daemon is older than its first bid, so older ones are refused unseen."""
    max_queued: int
    max_prompt_characters: int
    places_of_gateway: int
    """How many more jobs this gateway may have."""
    draining: bool


def check_dispatch_untrusted(
    dispatch: Dispatch, door: Doorkeeper, *, sender: PeerId, now: UnixMilliseconds
) -> DispatchToken | Refuse:
    """The token that entitles `sender` to this job, or the Refuse to send back.

    `sender` is proven by the transport, `now` is read on the coordinator's clock.  Raises nothing,
    whatever is in the dispatch.  The caller notes the token as used before it awaits anything.
    """
    token = _token_untrusted(dispatch, door.coordinator)
    if isinstance(token, Refuse):
        return token
    fault = (
        _fault_of_parties(token, door, sender)
        or _fault_of_time(token, door, now)
        or _fault_of_model(token, door)
        or _fault_of_size(token, dispatch, door)
        or _fault_of_content(token, dispatch)
        or _fault_of_room(token, door)
    )
    return token if fault is None else refusal(dispatch.request_id, *fault)


def refusal(request_id: RequestId, reason: RefuseReason, explanation: str) -> Refuse:
    """A Refuse with its explanation cut to what the message takes."""
    return Refuse(request_id=request_id, reason=reason, explanation=explanation[:300])


_Fault = tuple[RefuseReason, str]


def _token_untrusted(dispatch: Dispatch, coordinator: PeerId) -> DispatchToken | Refuse:
    request_id = dispatch.request_id
    if dispatch.token.signer != coordinator:
        return refusal(
            request_id,
            RefuseReason.WRONG_SIGNER,
            f"the token is signed by {dispatch.token.signer}; we trade with {coordinator}",
        )
    try:
        token = open_untrusted(dispatch.token, DispatchToken, signer=coordinator)
    except RemoteProtocolError as exc:
        forged = exc.action is PeerAction.BAN
        reason = RefuseReason.WRONG_SIGNER if forged else RefuseReason.MALFORMED_TOKEN
        return refusal(request_id, reason, str(exc))
    if token.request_id != request_id:
        return refusal(request_id, RefuseReason.MALFORMED_TOKEN, "the token is for another request")
    return token


def _fault_of_parties(token: DispatchToken, door: Doorkeeper, sender: PeerId) -> _Fault | None:
    if token.provider != door.me:
        return RefuseReason.OTHER_PROVIDER, "the token names another provider"
    if token.gateway != sender:
        return RefuseReason.OTHER_GATEWAY, "the token names another gateway"
    return None


def _fault_of_time(token: DispatchToken, door: Doorkeeper, now: UnixMilliseconds) -> _Fault | None:
    # A token that was used keeps being refused as such, also when it has expired meanwhile.
    if token.request_id in door.used:
        return RefuseReason.REPLAYED, "the token was used before"
    if now >= token.expires_at:
        return RefuseReason.EXPIRED, f"the token expired {now - token.expires_at} ms ago"
    if now >= token.deadline:
        return RefuseReason.EXPIRED, f"the deadline passed {now - token.deadline} ms ago"
    if token.issued_at < door.first_issue:
        return RefuseReason.REPLAYED, "the token is older than this run of the provider"
    return None


def _fault_of_model(token: DispatchToken, door: Doorkeeper) -> _Fault | None:
    stock = door.stock.get(token.model)
    if stock is None or token.kind_of_job not in stock.offer.kinds:
        return RefuseReason.WRONG_MODEL, f"no {token.kind_of_job} with {token.model} here"
    if token.model_digest != stock.offer.digest:
        return RefuseReason.WRONG_MODEL, f"{token.model} has other weights here"
    return None


def _fault_of_size(token: DispatchToken, dispatch: Dispatch, door: Doorkeeper) -> _Fault | None:
    sampling = dispatch.sampling
    most = sampling.n * sampling.max_tokens
    if most > token.output_limit:
        return (
            RefuseReason.OVER_LIMITS,
            f"max_tokens {most} is over the limit of {token.output_limit}",
        )
    if dispatch.resume_token_ids and sampling.n > 1:
        return RefuseReason.OVER_LIMITS, "several answers cannot be gone on from"
    if dispatch.resume_token_ids and token.rank == 0:
        # Nobody served before the winner; what a gateway adds here it would not pay as a prompt.
        return RefuseReason.OVER_LIMITS, "the winner has nothing to go on from"
    if len(dispatch.resume_token_ids) > token.output_limit:
        return RefuseReason.OVER_LIMITS, "more tokens to go on from than the whole answer may have"
    if _characters(dispatch.prompt) > door.max_prompt_characters:
        return (
            RefuseReason.OVER_LIMITS,
            f"the prompt is longer than {door.max_prompt_characters} characters",
        )
    return None


def _fault_of_content(token: DispatchToken, dispatch: Dispatch) -> _Fault | None:
    if dispatch.sampling.digest != token.sampling_digest:
        return RefuseReason.WRONG_SAMPLING, "these are not the sampling parameters of the auction"
    if not _fits(dispatch.prompt, token.kind_of_job):
        return RefuseReason.WRONG_INPUT, f"not the one prompt that a {token.kind_of_job} takes"
    if dispatch.prompt.commitment != token.input_commitment:
        return RefuseReason.WRONG_INPUT, "this is not the prompt of the auction"
    return None


def _fault_of_room(token: DispatchToken, door: Doorkeeper) -> _Fault | None:
    stock = door.stock[token.model]
    if door.draining:
        return RefuseReason.DRAINING, "this provider takes no new jobs"
    if not stock.ready:
        return RefuseReason.ENGINE_UNAVAILABLE, "the engine is being restarted"
    if stock.free + door.max_queued <= 0:
        return RefuseReason.FULL, f"{stock.running} jobs are running or waiting"
    if door.places_of_gateway <= 0:
        return RefuseReason.FULL, "this gateway has as many jobs here as one may have"
    return None


def _characters(prompt: Prompt) -> int:
    turns = sum(map(_characters_of_turn, prompt.turns or ()))
    tools = prompt.tools.tools if prompt.tools else ()
    described = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in tools)
    # A token id takes about as much memory as four characters, and stands for about as many.
    return turns + described + len(prompt.text or "") + 4 * len(prompt.token_ids or ())


def _characters_of_turn(turn: ChatTurn) -> int:
    calls = sum(len(call.id) + len(call.name) + len(call.arguments) for call in turn.tool_calls)
    return len(turn.role) + len(turn.content) + calls


def _fits(prompt: Prompt, kind: JobKind) -> bool:
    """Whether exactly one form of prompt is there, and it is one that this kind of job takes."""
    given = [form for form in (prompt.turns, prompt.text, prompt.token_ids) if form is not None]
    is_chat = kind is JobKind.CHAT
    has_tools = prompt.tools is not None
    return len(given) == 1 and (prompt.turns is not None) == is_chat and (is_chat or not has_tools)
