"""`/v1/receipts/…`: what was written about a job, decoded for reading and whole for checking.

The decoded fields are a convenience.  Who wants to be sure takes the envelope's bytes and checks
the signature over them.
"""

from __future__ import annotations

import base64
import math
import re
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pinaivu_gateway.context import Gateway
from pinaivu_gateway.errors import (
    SERVER,
    Asked,
    Problem,
    RequestRefused,
    problem_of,
    refusal,
)
from pinaivu_gateway.jobs import JobError
from pinaivu_node.protocol.errors import RemoteProtocolError
from pinaivu_node.protocol.ids import Milliseconds, RequestId
from pinaivu_node.protocol.market import AnswerRecord, AuctionRecord, Bid, Pass
from pinaivu_node.protocol.merkle import tree_root
from pinaivu_node.protocol.receipt import Receipt
from pinaivu_node.protocol.signing import Envelope, open_untrusted

LONGEST_WAIT: Final = 10.0
"""Seconds; settlement takes milliseconds, and its grace 10 s."""
_REQUEST_ID: Final = re.compile(r"req_[0-9a-f]{32}", re.ASCII)
_GARBLED: Final = Problem(
    502, "The coordinator's answer cannot be understood.", "upstream_error", None, SERVER
)


class ReceiptPages:
    """The routes."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway: Final = gateway

    async def receipt(self, request: Request) -> Response:
        """The receipt, and the statements it was made from."""
        request_id = _request_id(request)
        wait_ms = _wait(request.query_params.get("wait"))
        try:
            reply = await self._gateway.market.receipt(request_id, wait_ms=wait_ms)
        except JobError as error:
            raise RequestRefused(problem_of(error, Asked("", "request_id"))) from error
        if reply.receipt is None:
            raise RequestRefused(
                Problem(
                    404,
                    f"There is no receipt for {request_id}: the request is unknown, or it is not "
                    "settled yet. Ask again in a second, or add ?wait=5.",
                    "receipt_not_ready",
                    "request_id",
                    headers={"retry-after": "1"},
                )
            )
        try:
            fields = Receipt.from_body_untrusted(reply.receipt.body)
        except RemoteProtocolError as exc:
            raise RequestRefused(_GARBLED) from exc
        return JSONResponse(
            {
                "request_id": request_id,
                "receipt": jsonable(fields.model_dump()),
                "envelope": envelope_json(reply.receipt),
                "proofs": [envelope_json(each) for each in reply.proofs],
                "delivery": None if reply.delivery is None else envelope_json(reply.delivery),
            }
        )

    async def bids(self, request: Request) -> Response:
        """Everything that decided the auction: the leaves, and what they say."""
        request_id = _request_id(request)
        try:
            leaves = await self._gateway.market.bid_set(request_id)
        except JobError as error:
            raise RequestRefused(problem_of(error, Asked("", "request_id"))) from error
        if not leaves:
            raise RequestRefused(
                Problem(
                    404,
                    f"There is no bid set for {request_id}: the request is unknown, or its auction "
                    "is still open or had no winner.",
                    "bid_set_not_found",
                    "request_id",
                )
            )
        try:
            page = bid_set_json(request_id, leaves)
        except RemoteProtocolError as exc:
            raise RequestRefused(_GARBLED) from exc
        return JSONResponse(page)


def bid_set_json(request_id: RequestId, leaves: tuple[bytes, ...]) -> dict[str, Any]:
    """A bid set, decoded.  Raises RemoteProtocolError."""
    return {
        "request_id": request_id,
        "root": tree_root(leaves),
        "leaves": [base64.b64encode(each).decode() for each in leaves],
        "record": jsonable(AuctionRecord.from_body_untrusted(leaves[0]).model_dump()),
        "answers": [_answer(each) for each in leaves[1:]],
    }


def _answer(leaf: bytes) -> dict[str, Any]:
    record = AnswerRecord.from_body_untrusted(leaf)
    answer = open_untrusted(record.answer, Bid, Pass, signer=record.answer.signer)
    fields = jsonable(answer.model_dump())
    return {
        "kind": "bid" if isinstance(answer, Bid) else "pass",
        **fields,
        "received_at": record.received_at,
        "measurement": jsonable(record.measurement.model_dump()),
        "banned": record.banned,
        "full": record.full,
    }


def envelope_json(envelope: Envelope) -> dict[str, str]:
    """Whole, for whoever checks the signature."""
    return {
        "content": envelope.content,
        "body": base64.b64encode(envelope.body).decode(),
        "signer": envelope.signer,
        "signature": base64.b64encode(envelope.signature).decode(),
    }


def jsonable(value: Any) -> Any:
    """The same with bytes as base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {name: jsonable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(each) for each in value]
    return value


def _request_id(request: Request) -> RequestId:
    given: str = request.path_params["request_id"]
    if _REQUEST_ID.fullmatch(given) is None:
        raise refusal(
            "Invalid 'request_id': a request id is req_ and 32 hex digits.",
            code="invalid_value",
            param="request_id",
        )
    return RequestId(given)


def _wait(given: str | None) -> Milliseconds:
    """Bounded, however much is asked for."""
    try:
        seconds = float(given or 0)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise refusal(
            "Invalid 'wait': it is a number of seconds.", code="invalid_value", param="wait"
        )
    return Milliseconds(round(1000 * min(seconds, LONGEST_WAIT)))
