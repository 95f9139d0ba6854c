"""A link between two network namespaces: every packet late by a delay, some lost.

bad_link.py SPACE DEVICE SPACE DEVICE --delay SECONDS --loss SHARE
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import sys
import time

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEAD = 0x1001


def open_device(space: str, name: str) -> int:
    """A TUN device in that namespace, which this process enters."""
    entrance = os.open(f"/run/netns/{space}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(entrance, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {space}")
    os.close(entrance)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _TUN_WITHOUT_HEAD))
    return device


def carry(one: int, other: int, *, delay: float, loss: float) -> None:
    dice, order = random.Random(1), itertools.count()
    due: list[tuple[float, int, int, bytes]] = []
    poll = select.poll()
    poll.register(one, select.POLLIN)
    poll.register(other, select.POLLIN)
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) * 1000 if due else None
        for device, _ in poll.poll(wait):
            packet = os.read(device, 65536)
            if dice.random() >= loss:
                onward = other if device == one else one
                heapq.heappush(due, (time.monotonic() + delay, next(order), onward, packet))
        while due and due[0][0] <= time.monotonic():
            _, _, onward, packet = heapq.heappop(due)
            # Where it is down, or takes no more, the packet is lost, as on any link.
            with contextlib.suppress(OSError):
                os.write(onward, packet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ends", nargs=4)
    parser.add_argument("--delay", type=float, required=True)
    parser.add_argument("--loss", type=float, required=True)
    options = parser.parse_args()
    one = open_device(*options.ends[:2])
    other = open_device(*options.ends[2:])
    sys.stdout.write("up\n")
    sys.stdout.flush()
    carry(one, other, delay=options.delay, loss=options.loss)


if __name__ == "__main__":
    main()
