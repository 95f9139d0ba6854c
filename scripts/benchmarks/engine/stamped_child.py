"""The engine's own process, which also notes when it lets go of each frame of tokens.

Run by path in place of `pinaivu_node.engine.child`.  Each frame adds lines to the file that
`PINAIVU_BENCH_STAMPS` names: nanoseconds on the monotonic clock, request, tokens so far.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Final

from pinaivu_node.engine import child
from pinaivu_node.engine.frames import Frame
from pinaivu_node.engine.types import StepFrame

STAMPS: Final = "PINAIVU_BENCH_STAMPS"


def main() -> int:
    """As the child's own `main`."""
    target = os.open(os.environ[STAMPS], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    so_far: dict[str, int] = {}
    write = child._write  # noqa: SLF001 - the last place that a frame passes in this process

    def stamped(pipe: int, frame: Frame) -> None:
        if isinstance(frame, StepFrame):
            now = time.monotonic_ns()
            lines = []
            for event in frame.events:
                total = so_far.get(event.request_id, 0) + len(event.token_ids)
                so_far[event.request_id] = total
                lines.append(f"{now} {event.request_id} {total}\n")
            write(pipe, frame)
            # After the frame, so that the note costs nothing of what is measured.
            os.write(target, "".join(lines).encode())
        else:
            write(pipe, frame)

    child._write = stamped  # noqa: SLF001
    return child.main()


if __name__ == "__main__":
    sys.exit(main())
