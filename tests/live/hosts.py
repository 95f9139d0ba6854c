"""Hosts of their own on one machine: network namespaces, NATs between them, a bad link.

    inet      routes between public addresses, 198.51.100.x
    host      has a public address, or one of a home network behind a NAT
    nat       masquerades for its home network, and lets nothing in that was not asked for

Needs root, iproute2 and nftables; a link with delay and loss needs /dev/net/tun, since not every
kernel has netem.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LINK = Path(__file__).with_name("bad_link.py")
_NAT = """
table ip nat {
  chain out { type nat hook postrouting priority 100; oifname "wan" masquerade; }
}
table ip filter {
  chain through {
    type filter hook forward priority 0; policy drop;
    iifname "lan" %s accept
    ct state established,related accept
  }
  chain in { type filter hook input priority 0; iifname "wan" ct state new drop; }
}
"""


def missing() -> str | None:
    """Why no hosts can be made here; None if they can."""
    for tool in ("ip", "nft"):
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            return f"{tool} is not installed (Debian: iproute2, nftables)"
    name = f"pnv{os.getpid()}try"
    try:
        done = subprocess.run(
            ["ip", "netns", "add", name], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return f"namespaces cannot be made: {done.stderr.strip()}"
        done = in_host(name, "nft", "add", "table", "ip", "nat")
        return f"nft does not work: {done.stderr.strip()}" if done.returncode else None
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def in_host(name: str, *command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ip", "netns", "exec", name, *command],
        input=stdin, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


class Internet:
    """Made by `internet`."""

    def __init__(self) -> None:
        self._prefix = f"pnv{os.getpid()}"
        self._spaces: list[str] = []
        self._links: list[subprocess.Popen[bytes]] = []
        self._addresses = 0
        self._inet = self._space("inet")

    def public(self, name: str, *, bad_link: bool = False) -> tuple[str, str]:
        """A host with a public address: its namespace and that address."""
        space = self._space(name)
        return space, self._attach(space, bad_link=bad_link)

    def hidden(self, name: str, *, lets_out: str = "", bad_link: bool = False) -> str:
        """A host behind a NAT of its own, which may let out some kinds of traffic only."""
        router, space = self._space(f"{name}-nat"), self._space(name)
        self._attach(router, bad_link=bad_link)
        ip(router, "link add lan type veth peer name wan netns", space)
        ip(router, "addr add 192.168.1.1/24 dev lan")
        ip(router, "link set lan up")
        ip(space, "addr add 192.168.1.2/24 dev wan")
        ip(space, "link set wan up")
        ip(space, "route add default via 192.168.1.1")
        done = in_host(router, "nft", "-f", "-", stdin=_NAT % lets_out)
        assert done.returncode == 0, done.stderr
        return space

    def neighbours(self, one: str, other: str) -> tuple[str, str]:
        """Two hosts on a network of their own, with nothing else on it."""
        first, second = self._space(one), self._space(other)
        ip(first, "link add lan type veth peer name lan netns", second)
        for number, space in enumerate((first, second), 1):
            ip(space, f"addr add 192.168.2.{number}/24 dev lan")
            ip(space, "link set lan up")
        return first, second

    def take_down(self) -> None:
        for link in self._links:
            link.send_signal(signal.SIGTERM)
            link.wait()
        for space in self._spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)

    def _space(self, name: str) -> str:
        space = f"{self._prefix}-{name}"
        subprocess.run(["ip", "netns", "add", space], check=True)
        self._spaces.append(space)
        ip(space, "link set lo up")
        done = in_host(space, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        assert done.returncode == 0, done.stderr
        return space

    def _attach(self, space: str, *, bad_link: bool) -> str:
        self._addresses += 1
        address, ours = f"198.51.100.{self._addresses}", f"to{self._addresses}"
        if bad_link:
            self._links.append(start_link((self._inet, ours), (space, "wan")))
        else:
            ip(self._inet, f"link add {ours} type veth peer name wan netns", space)
        ip(self._inet, f"addr add 198.51.100.254/32 dev {ours}")
        ip(self._inet, f"link set {ours} up")
        ip(self._inet, f"route add {address} dev {ours}")
        ip(space, f"addr add {address}/32 dev wan")
        ip(space, "link set wan up")
        ip(space, "route add 198.51.100.254 dev wan")
        ip(space, "route add default via 198.51.100.254 dev wan onlink")
        return address


def ip(space: str, command: str, *more: str) -> None:
    subprocess.run(["ip", "-n", space, *command.split(), *more], check=True)


def start_link(one: tuple[str, str], other: tuple[str, str]) -> subprocess.Popen[bytes]:
    """A process that carries packets between two namespaces, late and not all."""
    process = subprocess.Popen(
        [sys.executable, str(_LINK), *one, *other, "--delay", "0.04", "--loss", "0.01"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    process.stdout.close()
    return process


@contextmanager
def internet() -> Iterator[Internet]:
    """Everything in it is taken down at the end; processes in its hosts are the caller's."""
    made = Internet()
    try:
        yield made
    finally:
        made.take_down()
