"""Settings, addresses, keys on the command line, and the daemon as its operator meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pinaivu_gateway.config import ConfigError, load, split_address
from pinaivu_gateway.http_server import ListenError, base_url, bind
from pinaivu_gateway.keys import bearer_untrusted, hash_of, key_of, prefix_of


def test_flags_are_stronger_than_variables_and_those_than_the_file(tmp_path: Path, monkeypatch):
    (tmp_path / "config.toml").write_text(
        'listen = "127.0.0.1:1"\ndatabase = "sqlite:///f"\ncoordinator = "file"\n'
        "[http]\nping_interval = 3\n"
    )
    monkeypatch.setenv("PINAIVU_GATEWAY_DATABASE", "sqlite:///v")
    monkeypatch.setenv("PINAIVU_GATEWAY_COORDINATOR", "variable")
    monkeypatch.setenv("PINAIVU_GATEWAY_MESH_LISTEN", "/ip4/1.2.3.4/tcp/1,/ip4/1.2.3.4/tcp/2")
    monkeypatch.setenv("PINAIVU_GATEWAY_HTTP__STALL_LIMIT", "5")
    flags = {"home": tmp_path, "coordinator": ["flag"], "listen": None, "mesh_listen": []}
    settings = load(flags, os.environ)
    assert (settings.listen, settings.database_url, settings.coordinator) == (
        "127.0.0.1:1",
        "sqlite:///v",
        ("flag",),
    )
    assert settings.mesh_listen == ("/ip4/1.2.3.4/tcp/1", "/ip4/1.2.3.4/tcp/2")
    assert (settings.http.ping_interval, settings.http.stall_limit) == (3, 5)


def test_the_home_may_come_from_a_variable_and_holds_the_database(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PINAIVU_GATEWAY_HOME", str(tmp_path))
    settings = load({}, os.environ)
    assert settings.home == tmp_path
    assert settings.database_url == f"sqlite:///{tmp_path}/gateway.db"


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("port = 5", "unknown setting 'port'"),
        ("[http]\nx = 5", "unknown setting 'http.x'"),
        ("[http]\nkeep_alive = 0", "setting 'http.keep_alive'"),
        ("listen = ", "cannot read the configuration"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, toml, words):
    (tmp_path / "config.toml").write_text(toml)
    with pytest.raises(ConfigError, match=words):
        load({"home": tmp_path}, {})


def test_a_misspelt_variable_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="PINAIVU_GATEWAY_LISTN"):
        load({"home": tmp_path}, {"PINAIVU_GATEWAY_LISTN": "x", "PINAIVU_HOME": "y"})


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:0", ("::1", 0)),
        (":8080", ("0.0.0.0", 8080)),
        ("localhost:1", ("localhost", 1)),
    ],
)
def test_an_address_is_split(listen, expected):
    assert split_address(listen) == expected


@pytest.mark.parametrize("listen", ["8080", "host:", "host:x", "host:65536", "", "host:-1"])
def test_what_is_no_address_is_refused(listen):
    with pytest.raises(ConfigError):
        split_address(listen)


def test_a_taken_port_is_one_sentence():
    with bind("127.0.0.1:0") as first:
        port = first.getsockname()[1]
        assert base_url(first) == f"http://127.0.0.1:{port}/v1"
        with pytest.raises(ListenError, match="in use by another process"):
            bind(f"127.0.0.1:{port}")


def test_a_key_is_256_bits_and_only_its_hash_is_kept():
    key = key_of(bytes(range(32)))
    assert key == "sk-pnv-AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
    assert prefix_of(key) == "sk-pnv-AAECAwQF"
    assert len(hash_of(key)) == 64
    with pytest.raises(ValueError, match="32 random bytes"):
        key_of(b"short")


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer a", "a"),
        ("bearer  a ", "a"),
        ("Bearer", None),
        ("Basic a", None),
        ("", None),
        (None, None),
        ("Bearer " + "a" * 257, None),
    ],
)
def test_the_key_is_read_from_the_header(header, key):
    assert bearer_untrusted(header) == key


def run(*arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pinaivu_gateway.cli", *map(str, arguments), "--home", str(home)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_key_lives_and_dies_on_the_command_line(tmp_path: Path):
    made = run("keys", "create", "--name", "lap[top]", "--json", home=tmp_path)
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)["key"]
    assert key.startswith("sk-pnv-")
    gone = run("keys", "revoke", prefix_of(key), home=tmp_path)
    assert gone.returncode == 0, gone.stderr
    (listed,) = json.loads(run("keys", "list", "--json", home=tmp_path).stdout)
    assert (listed["prefix"], listed["name"]) == (prefix_of(key), "lap[top]")
    assert listed["revoked_at"] is not None
    assert key not in str(listed)
    database = (tmp_path / "gateway.db").read_bytes()
    assert key.encode() not in database


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("keys", "revoke", "sk-pnv-none"), "no key begins with"),
        (("serve",), "which coordinator?"),
        (("serve", "--coordinator", "/ip4/1.2.3.4/tcp/1"), "which coordinator?"),
    ],
)
def test_what_an_operator_can_mend_is_one_sentence(tmp_path: Path, arguments, words):
    done = run(*arguments, home=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
