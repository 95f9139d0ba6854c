"""Gossip among real hosts: whoever stays hears everything once, whoever else comes and goes."""

from __future__ import annotations

import pytest

from scripts.benchmarks.gossip import gossip

pytestmark = [pytest.mark.live, pytest.mark.timeout(120)]


@pytest.mark.parametrize("hosts", [5, 20, 50])
@pytest.mark.parametrize("shape", ["star", "mesh"])
async def test_everyone_who_stays_hears_everything_once(shape, hosts):
    heard = await gossip(shape, hosts, messages=20, comers=3)
    assert heard.share == 1
    assert heard.twice == 0
