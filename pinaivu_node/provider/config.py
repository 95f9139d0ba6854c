"""What an operator may choose about selling, and what limits the harm that others can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from pinaivu_node.protocol.ids import Milliseconds, MillisecondsField


class ProviderConfig(BaseModel, frozen=True, extra="forbid"):
    """Handed to `serve_provider`; prices are in each `ServedModel`."""

    proofs_folder: Path | None
    """Where proofs wait for their receipts; made if it does not exist.  None: in memory only, for
    simulated networks, where a thread would break the virtual clock."""
    max_proofs: Annotated[int, Field(ge=1)] = 10_000
    """Unreceipted proofs kept, a kilobyte each: a coordinator that was away for a day of busy
    trading.  Beyond it the oldest are given up."""
    max_queued: Annotated[int, Field(ge=0)] = 4
    """Jobs taken beyond the engine's capacity.  We bid only with a free place, but bids of
    overlapping auctions may all win; a short wait is better than refusing the last of them."""
    max_jobs_per_gateway: Annotated[int, Field(ge=1)] = 1024
    """Jobs of one gateway at once; the engines' capacity is usually the tighter bound."""
    max_streams: Annotated[int, Field(ge=1)] = 256
    """Inference streams at once; beyond it the one that has been idle longest gives way."""
    max_kept_gateways: Annotated[int, Field(ge=0)] = 64
    """Gateways that we stay connected to by dialling out, each a socket and a keep-alive."""
    max_unvouched_tokens: Annotated[int, Field(ge=1)] = 512
    """What a gateway that never vouches can take from us per job: four of the steps of 128 tokens
    in which gateways vouch, so that a slow link to an honest one stops nothing."""
    max_outbound_bytes: Annotated[int, Field(ge=1024, le=512 * 1024)] = 256 * 1024
    """Tokens that wait for one gateway to read: some four seconds of 64 fast answers, beyond what
    the mesh queues.  Half the longest frame at most, so that all of it fits one."""
    max_prompt_characters: Annotated[int, Field(ge=1)] = 900_000
    """What fits a frame; lower it where memory is short."""
    max_delay_ms: MillisecondsField = Milliseconds(30_000)
    """What a model may still need to be loaded when we bid with it: about as long as a person waits
    for an answer.  What takes longer is passed up, and loaded for the next job."""
    accept_within_ms: MillisecondsField = Milliseconds(2_000)
    """A job whose model is being loaded is accepted no later: gateways wait five seconds for an
    Accept, and for a first token longer."""
    bid_validity_ms: MillisecondsField = Milliseconds(10_000)
    """How long after the close a bid may still be taken up: as long as dispatch tokens live."""
