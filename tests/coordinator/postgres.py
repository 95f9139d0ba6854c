"""A PostgreSQL server of our own for as long as the tests run: a socket in a folder, no port."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

USERS = ("postgres", "nobody")  # the server refuses to run as root


def binaries() -> Path | None:
    """Where initdb and postgres are; None if this machine has none."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    found = shutil.which("initdb")
    if found is not None:
        installed.append(Path(found).resolve())
    return installed[0].parent if installed else None


@contextlib.contextmanager
def running_server(bin_folder: Path) -> Iterator[str]:
    """Yield the URL of an empty database on a fresh server."""
    with tempfile.TemporaryDirectory(prefix="pinaivu-pg-") as name:
        folder = Path(name)
        data = folder / "data"
        prefix = _as_somebody_else(folder) if os.geteuid() == 0 else []
        run = [*prefix, str(bin_folder / "initdb"), "-D", str(data), "-U", "pinaivu"]
        _check([*run, "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"])
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        control = [*prefix, str(bin_folder / "pg_ctl"), "-D", str(data), "-w"]
        _check([*control, "-o", options, "-l", str(folder / "log"), "start"])
        try:
            yield f"postgresql://pinaivu@/postgres?host={folder}"
        finally:
            _check([*control, "-m", "immediate", "stop"])


def _as_somebody_else(folder: Path) -> list[str]:
    for user in USERS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(user)
            os.chown(folder, entry.pw_uid, entry.pw_gid)
            ids = ["--reuid", str(entry.pw_uid), "--regid", str(entry.pw_gid)]
            return ["setpriv", *ids, "--clear-groups"]
    raise RuntimeError(f"none of the users {USERS} exists")


def _check(command: list[str]) -> None:
    # To files and not to pipes: the server inherits them and would hold a pipe open.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False, cwd="/"
        )
        if done.returncode:
            output.seek(0)
            raise RuntimeError(f"{command}: {output.read().decode(errors='replace')}")
