"""Request ids that must not be answered twice, for as long as a second one could pass."""

from __future__ import annotations

from pinaivu_node.protocol.ids import RequestId, UnixMilliseconds


class SeenRequests:
    """A bounded set of request ids, each kept until its own moment."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._until: dict[RequestId, UnixMilliseconds] = {}

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._until

    def __len__(self) -> int:
        return len(self._until)

    def add(self, request_id: RequestId, *, until: UnixMilliseconds, now: UnixMilliseconds) -> bool:
        """Remember this id; False, and nothing is remembered, if the set is full of live ids.

        Full means that we cannot tell a repetition any more, so the caller must not go on.
        """
        if len(self._until) >= self._capacity:
            self._until = {each: end for each, end in self._until.items() if end > now}
            if len(self._until) >= self._capacity:
                return False
        self._until[request_id] = until
        return True
