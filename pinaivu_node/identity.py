"""The key file: 32 bytes that are this peer's libp2p identity and its signing key."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

SEED_BYTES: Final = 32
KEY_FILE: Final = "identity.key"


class IdentityError(Exception):
    """The key file cannot be used; the message says what to do."""


def load_or_create_seed(home: Path) -> bytes:
    """The seed in `home`/identity.key, made on first use with mode 0600.

    A half-written key can never be left behind: it is written aside and linked into place, and of
    two processes that race the first wins.  Raises IdentityError.
    """
    path = home / KEY_FILE
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            _create(path)
        return _load(path)
    except OSError as exc:
        raise IdentityError(f"cannot use {path}: {exc.strerror}") from exc


def _create(path: Path) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, secrets.token_bytes(SEED_BYTES))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was first; its key is the identity
    finally:
        draft.unlink()


def _load(path: Path) -> bytes:
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise IdentityError(f"{path} can be read by others (mode {mode:o}): run chmod 600 {path}")
    seed = path.read_bytes()
    if len(seed) != SEED_BYTES:
        raise IdentityError(
            f"{path} holds {len(seed)} bytes instead of {SEED_BYTES}: restore it from a backup, "
            "or remove it to start with a new identity"
        )
    return seed
