from __future__ import annotations

import stat
from pathlib import Path

import pytest

from pinaivu_node.identity import IdentityError, load_or_create_seed


def test_a_key_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    seed = load_or_create_seed(home)
    assert len(seed) == 32
    assert load_or_create_seed(home) == seed
    assert stat.S_IMODE((home / "identity.key").stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == ["identity.key"]


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    load_or_create_seed(tmp_path)
    (tmp_path / "identity.key").chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        load_or_create_seed(tmp_path)


def test_a_damaged_key_is_never_replaced_silently(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(b"short")
    path.chmod(0o600)
    with pytest.raises(IdentityError, match="restore it from a backup"):
        load_or_create_seed(tmp_path)
    assert path.read_bytes() == b"short"


def test_a_home_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IdentityError, match="cannot use"):
        load_or_create_seed(tmp_path / "file" / "home")
