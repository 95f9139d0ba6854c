"""What an operator sees while her provider works: drawn again twice a second, on a terminal only.

`render` is pure; `show` is the clock and the terminal around it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pinaivu_node.engine.fleet.residency import Residence, Standing
from pinaivu_node.protocol.inference import Finish
from pinaivu_node.provider.statistics import (
    FinishedJob,
    ModelStatistics,
    ProviderStatistics,
    RunningJob,
)

_REFRESH_S: Final = 0.5
_SAMPLES: Final = 60
"""Half a minute of speed, one column each."""
_FRAME_LINES: Final = 19
"""All that is not a job or a model: borders, headings, figures."""
_BARS: Final = "▁▂▃▄▅▆▇█"
_ENDINGS: Final = {
    Finish.STOP: ("done", "green"),
    Finish.LENGTH: ("done", "green"),
    Finish.TOOL_CALLS: ("done", "green"),
    Finish.CANCELLED: ("cancelled", "yellow"),
    Finish.ERROR: ("failed", "red"),
}


class SpeedHistory:
    """Tokens per second of the last half minute, from a counter that is read now and then."""

    def __init__(self) -> None:
        self._speeds: deque[float] = deque([0.0] * _SAMPLES, maxlen=_SAMPLES)
        self._last: tuple[float, int] | None = None

    def note(self, tokens: int, *, now: float) -> None:
        """The counter stands at `tokens` now."""
        if self._last is not None and now > self._last[0]:
            self._speeds.append(max(0, tokens - self._last[1]) / (now - self._last[0]))
        self._last = (now, tokens)

    @property
    def speeds(self) -> tuple[float, ...]:
        """Oldest first."""
        return tuple(self._speeds)


async def show(read: Callable[[], ProviderStatistics], console: Console | None = None) -> None:
    """Keep the screen up to date until cancelled; log lines scroll by above it."""
    console = console or Console()
    started_at = trio.current_time()
    history = SpeedHistory()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            now = trio.current_time()
            statistics = read()
            history.note(statistics.tokens_served, now=now)
            picture = render(
                statistics,
                history.speeds,
                uptime_s=now - started_at,
                height=console.height - 1,  # the cursor has a line of its own
            )
            live.update(picture, refresh=True)
            await trio.sleep(_REFRESH_S)


def render(
    statistics: ProviderStatistics, speeds: Sequence[float], *, uptime_s: float, height: int
) -> RenderableType:
    """The whole screen; it fits 80 columns and 24 lines, and uses what there are."""
    remarks = tuple(_remarks(statistics))
    rows = max(2, height - _FRAME_LINES - len(statistics.models) - len(remarks))
    running = min(len(statistics.running), rows - min(len(statistics.last_jobs), rows // 2))
    parts: list[RenderableType] = [
        _header(statistics, uptime_s),
        _figures(statistics, speeds, remarks),
        _running(statistics.running, rows=max(1, running)),
    ]
    if statistics.last_jobs:
        parts.append(_finished(statistics.last_jobs[: rows - running]))
    parts.append(Text("Ctrl-C stops · pinaivu-node drain lets the running jobs finish", "dim"))
    return Group(*parts)


def _header(statistics: ProviderStatistics, uptime_s: float) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_row("peer", Text(statistics.peer_id, overflow="ellipsis"))
    grid.add_row("coordinator", _connection(statistics))
    for number, model in enumerate(statistics.models):
        grid.add_row("" if number else "models", _model(model))
    return Panel(
        grid,
        title=Text("pinaivu provider", "bold cyan"),
        title_align="left",
        subtitle=Text(f"up {_duration(uptime_s)}", "dim"),
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="cyan",
    )


def _connection(statistics: ProviderStatistics) -> Text:
    peer = (_short(statistics.coordinator), "dim")
    if not statistics.connected:
        return Text.assemble(("○ looking for it  ", "yellow"), peer)
    if statistics.draining:
        return Text.assemble(("◐ draining, no new jobs  ", "yellow"), peer)
    return Text.assemble(("● connected  ", "green"), peer)


def _model(model: ModelStatistics) -> Text:
    name = (f"{model.model}  ", "bold")
    standing = model.standing
    if standing is not None and standing.residence is not Residence.WARM:
        return Text.assemble(name, _away(standing))
    if not model.ready:
        return Text.assemble(name, (_starting(model.load_progress), "yellow"))
    device = f"{model.device} · " if model.device else ""
    return Text.assemble(
        name,
        (f"{device}{model.running} of {model.capacity} busy", ""),
        (f" · {model.tokens_per_second:,.0f} tok/s each", "dim"),
        (_cache(model), "dim"),
    )


def _cache(model: ModelStatistics) -> str:
    """What the engine keeps of prompts, where it keeps something."""
    words = ""
    if model.cached_tokens:
        words += f" · {100 * model.cached_tokens // max(1, model.input_tokens)} % warm"
    if model.kv_blocks:
        words += f" · KV {100 * model.kv_blocks_free // model.kv_blocks} % free"
    return words


def _starting(progress: float) -> str:
    return f"loading {progress:.0%}" if 0 < progress < 1 else "engine is starting"


def _away(standing: Standing) -> tuple[str, str]:
    """What there is to say of a model that is not in memory, and how it looks."""
    match standing.residence:
        case Residence.FAILED:
            return f"failed: {standing.reason}", "red"
        case Residence.LOADING:
            return f"loading {standing.progress:.0%}", "yellow"
        case _:
            wait = f"loaded when asked, {standing.delay_ms / 1000:,.0f} s"
            return f"cold · {standing.reason or wait}", "dim"


def _figures(
    statistics: ProviderStatistics, speeds: Sequence[float], remarks: Sequence[Text]
) -> RenderableType:
    passes = sum(statistics.passes.values())
    grid = Table.grid(padding=(0, 3))
    for _ in range(5):
        grid.add_column(no_wrap=True)
    grid.add_row(
        *(Text(name, "dim") for name in ("earned", "tokens served", "bids", "won", "passed"))
    )
    grid.add_row(
        Text(f"{money(statistics.earnings)} X", "bold green"),
        Text(f"{statistics.tokens_served:,}", "bold"),
        Text(f"{statistics.bids:,}", "bold"),
        Text(f"{statistics.won:,}{_share(statistics.won, statistics.bids)}", "bold"),
        Text(_passes(statistics) if passes else "0"),
    )
    return Panel(
        Group(grid, Text(), _speed_line(speeds), *remarks),
        box=box.ROUNDED,
        border_style="dim",
    )


def _speed_line(speeds: Sequence[float]) -> Text:
    now = speeds[-1] if speeds else 0.0
    return Text.assemble((sparkline(speeds), "cyan"), (f"  {now:,.0f}", "bold"), (" tok/s", "dim"))


def _remarks(statistics: ProviderStatistics) -> Iterable[Text]:
    if statistics.unpaid_proofs:
        yield Text(f"{statistics.unpaid_proofs:,} proofs wait for their receipts", "dim")
    if statistics.refusals:
        reasons = ", ".join(f"{count} {reason}" for reason, count in statistics.refusals.items())
        yield Text(f"refused: {reasons}", "yellow", overflow="ellipsis", no_wrap=True)


def _passes(statistics: ProviderStatistics) -> str:
    ranked = sorted(statistics.passes.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in ranked]
    return words[0] if len(words) == 1 else f"{words[0]} +{len(words) - 1} more"


def _running(jobs: Sequence[RunningJob], *, rows: int) -> RenderableType:
    if not jobs:
        return Panel(Text("waiting for jobs", "dim"), box=box.ROUNDED, border_style="dim")
    table = _table(_counted("running", len(jobs), rows), "gateway", "tokens", "tok/s")
    for job in jobs[:rows]:
        table.add_row(
            Text(_request(job.request_id)),
            Text(job.model),
            Text(_short(job.gateway), "dim"),
            Text(f"{job.tokens:,}"),
            Text(f"{job.tokens_per_second:,.1f}"),
        )
    return table


def _counted(title: str, total: int, rows: int) -> str:
    return title if total <= rows else f"{title}: {total:,}"


def _finished(jobs: Sequence[FinishedJob]) -> RenderableType:
    table = _table("finished", "ended", "tokens", "paid, X")
    for job in jobs:
        word, style = _ENDINGS[job.finish]
        table.add_row(
            Text(_request(job.request_id)),
            Text(job.model),
            Text(word, style),
            Text(f"{job.tokens:,}"),
            Text("waits", "dim") if job.paid is None else Text(money(job.paid), "green"),
        )
    return table


def _table(title: str, third: str, fourth: str, fifth: str) -> Table:
    table = Table(box=box.ROUNDED, expand=True, border_style="dim", header_style="dim")
    table.add_column(title, no_wrap=True, ratio=3)
    table.add_column("model", no_wrap=True, overflow="ellipsis", ratio=4)
    table.add_column(third, no_wrap=True, overflow="ellipsis", ratio=4)
    table.add_column(fourth, justify="right", no_wrap=True, ratio=2)
    table.add_column(fifth, justify="right", no_wrap=True, ratio=3)
    return table


def sparkline(values: Sequence[float]) -> str:
    """One bar per value, the highest being full; nothing is a low bar, not a gap."""
    top = max(values, default=0.0)
    if top <= 0:
        return _BARS[0] * len(values)
    last = len(_BARS) - 1
    return "".join(_BARS[min(last, round(last * max(0.0, value) / top))] for value in values)


def money(amount: int) -> str:
    """NanoX in X, exactly, with no more digits than it has and three at least."""
    whole, rest = divmod(amount, 10**9)
    return f"{whole:,}.{f'{rest:09}'.rstrip('0').ljust(3, '0')}"


def _request(request_id: str) -> str:
    return request_id.removeprefix("req_")[:10]


def _short(peer: str) -> str:
    """Every peer id begins with the same letters: its end tells them apart."""
    return f"…{peer[-8:]}"


def _share(part: int, whole: int) -> str:
    return f" ({100 * part // whole} %)" if whole else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
