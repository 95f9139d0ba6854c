"""Imports point down, never sideways; pure modules stay pure; each big library has one home."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NODE, GATEWAY = "pinaivu_node", "pinaivu_gateway"

# What each part may import of our own, besides itself.  A new part needs a row.
ALLOWED: dict[str, set[str]] = {
    "pinaivu_node.protocol": set(),
    "pinaivu_node.logs": set(),
    "pinaivu_node.interpreter": set(),
    "pinaivu_node.identity": set(),
    "pinaivu_node.control": set(),
    "pinaivu_node.config": set(),
    "pinaivu_node.engine": set(),
    "pinaivu_node.models": {"protocol"},
    "pinaivu_node.mesh": {"protocol"},
    "pinaivu_node.coordinator": {"protocol", "mesh"},
    "pinaivu_node.provider": {"protocol", "mesh", "engine"},
    "pinaivu_node.verification": {"protocol", "coordinator"},
    "pinaivu_node.evidence": {"protocol", "verification"},
    "pinaivu_node.screen": {"provider", "protocol", "engine"},
    "pinaivu_node.devnet": {"protocol", "identity"},
    "pinaivu_node.doctor": {"protocol", "mesh"},
    "pinaivu_node.desk": {"protocol", "mesh", "coordinator", "provider", "control", "doctor"},
    "pinaivu_node.daemon": {
        "protocol", "mesh", "coordinator", "provider", "engine", "models",
        "identity", "config", "control", "desk", "screen", "logs", "interpreter",
    },
    "pinaivu_node.cli": {
        "protocol", "daemon", "devnet", "verification", "evidence", "coordinator",
        "models", "identity", "config", "control", "doctor", "logs", "interpreter",
    },
    "pinaivu_gateway": {"protocol", "mesh", "identity", "models", "logs", "interpreter"},
}  # fmt: skip

IMPURE = {
    "time", "random", "secrets", "os", "pathlib", "socket", "ssl", "logging", "trio", "asyncio",
    "threading", "subprocess", "io", "shutil", "tempfile", "signal", "sqlalchemy", "httpx",
}  # fmt: skip
PURE = {
    "pinaivu_node.protocol": ["*"],
    "pinaivu_node.mesh": [
        "mesh", "peers", "framing", "backoff", "address", "counters", "noise", "pipes",
        "yamux.frames", "yamux.states", "yamux.windows", "yamux.events", "yamux.stream",
        "yamux.connection",
    ],
    "pinaivu_node.coordinator": [
        "auction", "open_auction", "reputation", "roster", "job", "settlement", "ledger", "pace",
        "refusal", "config",
    ],
    "pinaivu_node.provider": [
        "bidding", "dispatch", "jobs", "outbound", "pieces", "seen", "shelf", "warmth",
    ],
    "pinaivu_node.engine": [
        "types", "limits", "gauge", "frames", "codec", "sampling.noise", "fleet.residency",
        "batching.blocks", "batching.sequence", "batching.scheduler", "batching.pace",
        "batching.lookup", "chat.text", "chat.token_bytes", "chat.json_scan", "chat.call_syntax",
        "chat.tagged_calls", "chat.tool_calls", "chat.call_grammar", "chat.dialects",
        "chat.conversation",
    ],
    "pinaivu_gateway": [
        "jobs", "openai_schema", "translate", "sse", "keys", "errors", "failover", "awards",
        "fingerprints", "openai_struct", "response_format", "logprobs", "tools",
    ],
}  # fmt: skip

# Where each library may be imported at all.
HOMES: dict[str, tuple[str, ...]] = {
    "libp2p": ("pinaivu_node.mesh.libp2p",),
    "multiaddr": ("pinaivu_node.mesh.libp2p",),
    "torch": ("pinaivu_node.engine", "pinaivu_node.models.convert"),
    "transformers": ("pinaivu_node.engine", "pinaivu_node.models.convert"),
    "numba": ("pinaivu_node.engine.kernels", "pinaivu_node.engine.model.compiling"),
    "sqlalchemy": ("pinaivu_node.coordinator", "pinaivu_gateway.store", "pinaivu_gateway.schema",
                   "pinaivu_gateway.migrations"),
    "alembic": ("pinaivu_node.coordinator", "pinaivu_gateway.store", "pinaivu_gateway.migrations"),
    "typer": ("pinaivu_node.cli", "pinaivu_gateway.cli"),
    "starlette": ("pinaivu_gateway",),
    "hypercorn": ("pinaivu_gateway",),
    "nacl": ("pinaivu_node.protocol.signing",),
    "msgpack": ("pinaivu_node.protocol.wire", "pinaivu_node.engine.frames"),
}  # fmt: skip
# A pure package may still hold the driver's home out of reach of its pure modules: IMPURE says so.


def modules() -> Iterator[tuple[str, str]]:
    for package in (NODE, GATEWAY):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), path.read_text()


def imports_of(source: str) -> set[str]:
    """Every module that the source imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def part_of(module: str) -> str:
    """`pinaivu_node.mesh.libp2p.mesh` belongs to `pinaivu_node.mesh`."""
    parts = module.split(".")
    return GATEWAY if parts[0] == GATEWAY else ".".join(parts[:2])


def is_within(module: str, homes: Iterable[str]) -> bool:
    return any(module == home or module.startswith(home + ".") for home in homes)


def violations(module: str, source: str) -> Iterator[str]:
    part = part_of(module)
    imported = imports_of(source)
    allowed = ALLOWED.get(part, set())
    for name in imported:
        top = name.split(".")[0]
        if top in (NODE, GATEWAY) and part_of(name) not in (part, NODE):
            sibling = part_of(name).removeprefix(NODE + ".")
            if sibling not in allowed:
                yield f"{module} imports {name}"
        if top in HOMES and not is_within(module, HOMES[top]):
            yield f"{module} imports {top}, whose home is {', '.join(HOMES[top])}"
    if is_pure(module):
        for name in imported:
            if name.split(".")[0] in IMPURE:
                yield f"{module} is pure and imports {name}"


def is_pure(module: str) -> bool:
    for package, names in PURE.items():
        for name in names:
            if name == "*" and module.startswith(package):
                return True
            if module == f"{package}.{name}":
                return True
    return False


MODULES = list(modules())


@pytest.mark.parametrize(("module", "source"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_point_down(module: str, source: str) -> None:
    assert not sorted(set(violations(module, source)))


def test_every_part_has_a_row() -> None:
    parts = {part_of(module) for module, _ in MODULES} - {NODE}
    assert parts == set(ALLOWED)


def test_every_pure_module_exists() -> None:
    names = {module for module, _ in MODULES}
    listed = {f"{package}.{name}" for package, rows in PURE.items() for name in rows if name != "*"}
    assert listed <= names


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pinaivu_node.coordinator.service", "from pinaivu_node.provider import service"),
        ("pinaivu_node.engine.client", "from pinaivu_node.protocol.ids import PeerId"),
        ("pinaivu_gateway.app", "from pinaivu_node.coordinator.auction import decide"),
        ("pinaivu_node.protocol.wire", "def f():\n    import time"),
        ("pinaivu_node.provider.service", "import libp2p"),
        ("pinaivu_node.daemon", "import torch"),
    ],
)
def test_a_violation_is_seen(module: str, source: str) -> None:
    assert list(violations(module, source))
