from __future__ import annotations

import io
import math

import pytest
import trio
from rich.console import Console

from pinaivu_node.engine.fleet.residency import Residence, Standing
from pinaivu_node.protocol.inference import Finish, RefuseReason
from pinaivu_node.protocol.market import PassReason
from pinaivu_node.provider.statistics import (
    FinishedJob,
    ModelStatistics,
    ProviderStatistics,
    RunningJob,
)
from pinaivu_node.screen import SpeedHistory, money, render, show, sparkline

PEER = "12D3KooWBviqU27DnTcAzg98rdBe3oFHYTxFv2q3qsDFttszHrxW"
GATEWAY = "12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"


def model(name, **fields) -> ModelStatistics:
    return ModelStatistics(name, device="cpu", tokens_per_second=38.2, **fields)


def statistics(**changes) -> ProviderStatistics:
    fields = {
        "peer_id": PEER,
        "coordinator": GATEWAY,
        "connected": True,
        "draining": False,
        "models": (
            model("smollm2:135m", ready=True, running=2, capacity=4),
            model("qwen3:0.6b", ready=False, running=0, capacity=1),
        ),
        "running": tuple(
            RunningJob(f"req_{n:032x}", "smollm2:135m", GATEWAY, 120 + n, 31.4) for n in range(2)
        ),
        "last_jobs": (
            FinishedJob(f"req_{7:032x}", "smollm2:135m", 512, Finish.STOP, 104_300),
            FinishedJob(f"req_{8:032x}", "smollm2:135m", 12, Finish.CANCELLED),
            FinishedJob(f"req_{9:032x}", "smollm2:135m", 0, Finish.ERROR),
        ),
        "offers": 130,
        "bids": 120,
        "won": 31,
        "finished": 29,
        "passes": {PassReason.FULL: 8, PassReason.DRAINING: 2},
        "refusals": {RefuseReason.EXPIRED: 1},
        "rejected_messages": 0,
        "tokens_served": 1_204_551,
        "earnings": 12_345_678_900,
        "unpaid_proofs": 2,
        "gateways": 1,
    }
    return ProviderStatistics(**(fields | changes))


def drawn(width, *, height=40, **changes) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, force_terminal=True)
    speeds = [20 * (1 + math.sin(each / 5)) for each in range(60)]
    console.print(render(statistics(**changes), speeds, uptime_s=3723, height=height))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_shows_what_an_operator_asks(width):
    text = drawn(width)
    assert "12.3456789 X" in text
    assert "1,204,551" in text
    assert "31 (25 %)" in text
    assert "smollm2:135m" in text
    assert "2 of 4 busy" in text
    assert "engine is starting" in text
    assert "● connected" in text
    assert "8 full +1 more" in text
    assert "2 proofs wait" in text
    assert "31.4" in text
    assert "up 1 h 02 min" in text


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(width):
    assert max(map(len, drawn(width).splitlines())) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_models_that_are_not_in_memory_say_where_they_are(width):
    away = {"ready": True, "running": 0, "capacity": 4}
    in_use = "no memory for it while gemma3:270m, smollm2:135m is in use"
    models = (
        model("a:1b", **away, standing=Standing(Residence.WARM)),
        model("b:1b", **away, standing=Standing(Residence.LOADING, progress=0.404)),
        model("c:1b", **away, standing=Standing(Residence.COLD, delay_ms=5200)),
        model("d:1b", **away, standing=Standing(Residence.COLD, has_room=False, reason=in_use)),
        model("e:1b", **away, standing=Standing(Residence.FAILED, reason="a [red]fault" * 20)),
        model("f:1b", ready=False, running=0, capacity=1, load_progress=0.25),
    )
    text = drawn(width, models=models)
    assert "0 of 4 busy" in text
    assert "b:1b  loading 40%" in text
    assert "c:1b  cold · loaded when asked, 5 s" in text
    assert "d:1b  cold · no memory for it while gemma3:270m" in text
    assert "e:1b  failed: a [red]fault" in text
    assert "f:1b  loading 25%" in text
    assert max(map(len, text.splitlines())) <= width


def test_a_lost_coordinator_shows():
    assert "looking for it" in drawn(80, connected=False)


def test_draining_shows():
    assert "draining" in drawn(80, draining=True)


def test_an_idle_provider_waits_for_jobs():
    assert "waiting for jobs" in drawn(80, running=(), last_jobs=(), passes={}, refusals={})


@pytest.mark.parametrize("height", [24, 32, 60])
def test_many_jobs_do_not_push_the_screen_off_the_terminal(height):
    plenty = {"running": statistics().running * 200, "last_jobs": statistics().last_jobs * 20}
    lines = drawn(80, height=height, **plenty).splitlines()
    assert any("running: 400" in line for line in lines)
    assert any("cancelled" in line or "done" in line for line in lines)
    assert len(lines) <= max(height, 26)


def test_a_name_of_a_peer_is_no_markup():
    running = (RunningJob("req_[red]boom[/red]", "a[bold]b", "[blink]", 1, 1.0),)
    assert "a[bold]b" in drawn(120, running=running)


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0.000"),
        (1, "0.000000001"),
        (1_500_000_000, "1.500"),
        (1_234_000_000_000, "1,234.000"),
    ],
)
def test_money_is_exact(amount, text):
    assert money(amount) == text


def test_the_sparkline_follows_the_speed():
    assert sparkline([0, 5, 10]) == "▁▅█"
    assert sparkline([0, 0]) == "▁▁"


def test_speed_is_what_the_counter_gained():
    history = SpeedHistory()
    for now, tokens in enumerate((0, 50, 150)):
        history.note(tokens, now=now)
    assert history.speeds[-2:] == (50, 100)


async def test_the_live_screen_is_drawn_until_it_is_cancelled(autojump_clock):
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    drawings = []

    def read():
        drawings.append(trio.current_time())
        return statistics()

    with trio.move_on_after(2.2):
        await show(read, console)
    assert len(drawings) == 5
