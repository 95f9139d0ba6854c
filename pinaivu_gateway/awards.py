"""What an Award is worth: its dispatch tokens, each checked against the order it is for.

Pure.  A token that is not exactly ours would only be refused by its provider, or cost us more than
was agreed; so a single wrong one condemns the whole award, and with it the coordinator.
"""

from __future__ import annotations

from dataclasses import dataclass

from pinaivu_gateway.jobs import JobOrder
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import PeerId, UnixMilliseconds
from pinaivu_node.protocol.market import Award, DispatchToken, JobRequest, JobTerms
from pinaivu_node.protocol.signing import Envelope, open_untrusted


@dataclass(frozen=True, slots=True)
class Assignment:
    """One provider that may run the job, winner or standby."""

    token: DispatchToken
    envelope: Envelope
    """The token as signed: what is dispatched."""
    addresses: tuple[str, ...]

    @property
    def provider(self) -> PeerId:
        """Who it is."""
        return self.token.provider


def job_request(order: JobOrder, *, now: UnixMilliseconds) -> JobRequest:
    """What the coordinator is asked; `now` is read on its clock."""
    terms = JobTerms(
        request_id=order.request_id,
        kind=order.kind,
        model=order.model,
        model_digest=order.model_digest,
        input_estimate=min(order.input_estimate, order.input_limit),
        input_limit=order.input_limit,
        output_estimate=min(order.output_estimate, order.output_limit),
        output_limit=order.output_limit,
        max_prices=order.max_prices,
        preference=order.preference,
        sampling_digest=order.sampling.digest,
        input_commitment=order.prompt.commitment,
        deadline=UnixMilliseconds(now + order.deadline_in),
    )
    return JobRequest(
        terms=terms, allow=order.allow, deny=order.deny, fingerprints=order.fingerprints
    )


def open_award_untrusted(
    award: Award, request: JobRequest, *, coordinator: PeerId, gateway: PeerId
) -> tuple[Assignment, ...]:
    """The award's assignments, in the order in which they are to be tried.

    Raises RemoteProtocolError if any token is not signed by the coordinator for this very job.
    """
    addresses = {contact.peer: contact.addresses for contact in award.contacts}
    assignments: list[Assignment] = []
    for envelope in award.tokens:
        token = open_untrusted(envelope, DispatchToken, signer=coordinator)
        fault = _fault(token, request, gateway)
        if fault is not None:
            raise RemoteProtocolError(f"an award with a dispatch token {fault}")
        if token.rank != len(assignments):
            raise RemoteProtocolError("an award whose tokens are not in the order of their ranks")
        assignments.append(Assignment(token, envelope, addresses.get(token.provider, ())))
    if len({each.provider for each in assignments}) != len(assignments):
        raise RemoteProtocolError("an award that names one provider twice")
    return tuple(assignments)


def _fault(token: DispatchToken, request: JobRequest, gateway: PeerId) -> str | None:
    terms = request.terms
    if (token.gateway, token.request_id) != (gateway, terms.request_id):
        return "for another gateway or request"
    if (token.kind_of_job, token.model) != (terms.kind, terms.model):
        return "for another model or kind of job"
    if token.input_commitment != terms.input_commitment:
        return "for another prompt"
    if token.sampling_digest != terms.sampling_digest:
        return "for other sampling parameters"
    if (token.input_limit, token.output_limit) != (terms.input_limit, terms.output_limit):
        return "with other limits"
    return _fault_of_conditions(token, request)


def _fault_of_conditions(token: DispatchToken, request: JobRequest) -> str | None:
    terms = request.terms
    if token.deadline != terms.deadline:
        return "with another deadline"
    if terms.max_prices is not None and not token.prices.is_within(terms.max_prices):
        return "above the highest price allowed"
    if token.provider in request.deny:
        return "for a provider that was denied"
    if request.allow is not None and token.provider not in request.allow:
        return "for a provider that was not allowed"
    return None
