"""Where a receipt to be checked comes from: a gateway by HTTP, or a file saved from one."""

from __future__ import annotations

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

import httpx

from pinaivu_node.protocol.ids import PeerId, RequestId
from pinaivu_node.protocol.signing import Envelope
from pinaivu_node.verification import Evidence

_TIMEOUT_SECONDS = 15.0


class EvidenceError(Exception):
    """There is nothing to check, or it cannot be read; the message says what to do."""


def request_id_in(subject: str) -> RequestId | None:
    """The request id, if that is what the user named; None if it is a file."""
    return RequestId(subject) if re.fullmatch(r"req_[0-9a-f]{32}", subject) else None


def fetch_evidence(subject: str, *, gateway: str, api_key: str | None) -> Evidence:
    """The receipt with everything it was made from; raises EvidenceError."""
    request_id = request_id_in(subject)
    if request_id is None:
        return _from_file(Path(subject))
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=gateway, headers=headers, timeout=_TIMEOUT_SECONDS) as client:
        receipt = _get(client, f"/receipts/{request_id}?wait=10")
        bids = _get(client, f"/receipts/{request_id}/bids")
    return _evidence(receipt, bids)


def _from_file(path: Path) -> Evidence:
    """A saved receipt answer, or an object {"receipt": …, "bids": …} of both answers."""
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise EvidenceError(
            f"{path} is neither a request id nor a readable JSON file: {exc}"
        ) from exc
    if not isinstance(saved, dict):
        raise EvidenceError(f"{path} holds no receipt")
    if "envelope" in saved:
        return _evidence(saved, saved.get("bids"))
    return _evidence(saved.get("receipt"), saved.get("bids"))


def _get(client: httpx.Client, path: str) -> Any:
    try:
        answer = client.get(path)
        body = answer.json()
    except (httpx.HTTPError, ValueError) as exc:
        raise EvidenceError(
            f"cannot fetch from {client.base_url}: {exc}; name another with --gateway"
        ) from exc
    if answer.status_code != 200:
        message = body.get("error", {}).get("message") if isinstance(body, dict) else None
        raise EvidenceError(f"the gateway answers {answer.status_code}: {message}")
    return body


def _evidence(receipt: Any, bids: Any) -> Evidence:
    try:
        leaves = None if not bids else tuple(_bytes(leaf) for leaf in bids["leaves"])
        delivery = receipt.get("delivery")
        return Evidence(
            receipt=_envelope(receipt["envelope"]),
            proofs=tuple(_envelope(proof) for proof in receipt.get("proofs", ())),
            delivery=_envelope(delivery) if delivery else None,
            leaves=leaves,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise EvidenceError(
            "this is not a receipt as a gateway gives it: save the whole answer of "
            "GET /v1/receipts/{request_id}"
        ) from exc


def _envelope(fields: dict[str, str]) -> Envelope:
    return Envelope(
        content=fields["content"],
        body=_bytes(fields["body"]),
        signer=PeerId(fields["signer"]),
        signature=_bytes(fields["signature"]),
    )


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as exc:
        raise ValueError("not base64") from exc
