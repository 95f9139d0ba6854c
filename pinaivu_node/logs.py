"""How daemons log: lines for people, or JSON lines for machines.  Always on standard error."""

from __future__ import annotations

import logging
import sys
import time
from json import dumps
from typing import Final, TextIO

_QUIET: Final = {
    "libp2p": logging.ERROR,  # it reports what peers do to it, which our mesh reports better
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "hypercorn": logging.WARNING,
    "alembic": logging.WARNING,
    "multiaddr": logging.WARNING,
}
"""Libraries that say more than an operator wants to know."""


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to whatever standard error is now: a live screen puts itself in its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """See the class."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        del value
        raise AttributeError("standard error is not ours to replace")


class HumanFormatter(logging.Formatter):
    """`09:31:07 warning  mesh: the message`, in local time.

    Messages quote what strangers sent, so control characters are shown and not sent to the
    terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback below it if there is one."""
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        said = _printable(record.getMessage())
        lines = [f"{moment} {record.levelname.lower():<8} {_part(record.name)}: {said}"]
        if record.exc_info:
            lines += map(_printable, self.formatException(record.exc_info).splitlines())
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, and exception if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Never more than one line, whatever is in the message."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return dumps(fields, ensure_ascii=False)


def setup_logging(*, json: bool, level: int = logging.INFO) -> None:
    """Send every log line of this process to standard error; harmless when repeated."""
    handler = _StandardError()
    handler.setFormatter(JsonFormatter() if json else HumanFormatter())
    root = logging.getLogger()
    for former in root.handlers[:]:
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(level)
    for name, quiet in _QUIET.items():
        logging.getLogger(name).setLevel(max(quiet, level))


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def _part(logger: str) -> str:
    """`mesh` for `pinaivu_node.mesh.redial`: which part of the daemon speaks."""
    head, _, rest = logger.partition(".")
    return rest.partition(".")[0] if head.startswith("pinaivu_") and rest else head
