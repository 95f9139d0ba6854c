from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from pinaivu_node.logs import setup_logging


@pytest.fixture
def restored_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def lines(restored_logging, monkeypatch):
    def logged(*, as_json):
        setup_logging(json=as_json)
        # Put in its place afterwards, as a live screen does.
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        logger = logging.getLogger("pinaivu_node.mesh.redial")
        logger.info("met %s", "12D3\n\x1b[2Jagain")
        logging.getLogger("libp2p.pubsub").info("chatter")
        try:
            int("no number")
        except ValueError:
            logger.exception("it broke")
        return sys.stderr.getvalue().splitlines()

    return logged


def test_a_person_sees_the_part_that_speaks(lines):
    first, *rest = lines(as_json=False)
    assert first.endswith(r"info     mesh: met 12D3\n\x1b[2Jagain")
    assert rest[-1].startswith("ValueError: ")


def test_a_machine_sees_one_object_per_line(lines):
    met, broke = map(json.loads, lines(as_json=True))
    assert met["message"] == "met 12D3\n\x1b[2Jagain"
    assert met["logger"] == "pinaivu_node.mesh.redial"
    assert met["time"].endswith("Z")
    assert broke["level"] == "error"
    assert broke["exception"].startswith("Traceback")
