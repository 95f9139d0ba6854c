"""A coverage-guided fuzzer in plain Python, for machines that atheris has no wheel for.

An input that reaches a line which none before it reached is kept, and later inputs are made of
those that were kept.  libFuzzer does the same a few times as fast and sees more than lines.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Final

Target = Callable[[bytes], None]
_Line = tuple[CodeType, int]
_TELLING: Final = (0, 1, 2, 4, 8, 12, 16, 127, 128, 255)


class Failure(Exception):
    """`data` made the target raise; the cause is what it raised."""

    def __init__(self, data: bytes) -> None:
        super().__init__(f"{len(data)} bytes make it fail: {data.hex()}")
        self.data = data


def fuzz(
    target: Target,
    *,
    within: str,
    seed: int = 0,
    runs: int | None = None,
    seconds: float | None = None,
    longest: int = 600,
) -> int:
    """Try inputs until one fails, which raises Failure; returns how many lines were reached.

    Lines count in files whose path has `within` in it.
    """
    dice = random.Random(seed)  # noqa: S311 - no secret
    kept: list[bytes] = [b""]
    known: set[_Line] = set()
    until = None if seconds is None else time.monotonic() + seconds
    done = 0
    while (runs is None or done < runs) and (until is None or time.monotonic() < until):
        data = vary(dice.choice(kept), kept, dice)[:longest]
        reached = _lines_reached(target, data, within)
        if not reached <= known:
            known |= reached
            kept.append(data)
        done += 1
    return len(known)


def vary(data: bytes, kept: list[bytes], dice: random.Random) -> bytes:
    """A few changes to an input: bytes set, put in, taken out, copied, joined with another's."""
    varied = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randint(0, len(varied))
        match dice.randint(0, 6):
            case 0 | 1 if at < len(varied):
                varied[at] = dice.randrange(256)
            case 2 if at < len(varied):
                varied[at] = dice.choice(_TELLING)
            case 3:
                varied[at:at] = dice.randbytes(dice.randint(1, 16))
            case 4:
                del varied[at : at + dice.randint(1, 16)]
            case 5:
                varied[at:at] = varied[at : at + dice.randint(1, 32)]
            case _:
                varied[at:] = dice.choice(kept)[-at:]
    return bytes(varied)


def _lines_reached(target: Target, data: bytes, within: str) -> set[_Line]:
    reached: set[_Line] = set()

    def on_line(frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            reached.add((frame.f_code, frame.f_lineno))
        return on_line

    def on_call(frame: FrameType, _event: str, _argument: Any) -> Any:
        return on_line if within in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        target(data)
    except Exception as exc:
        raise Failure(data) from exc
    finally:
        sys.settrace(before)
    return reached
