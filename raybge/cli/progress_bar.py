"""Progress of one stage of a command, as the line that shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from raybge.util.plural import plural
from raybge.util.text_format import format_duration, shorten

BAR_WIDTHS = 8, 30
MIN_SECONDS = 1.0  # of a rate
_GAP = "  "


@dataclass
class ProgressBar:
    """Progress of one stage.

    Until `begin` or the first `update` the line names what happens instead; that time does not count for the rate.

    Args:
        stage: name of the stage.
        on_change: called after each change.
        total: number of units; None if it is unknown, or nothing is counted.
        unit: singular name of a unit.
        activity: description of the current activity if it is not the counted one.

    Attributes:
        n: number of units that are done.
        note: text at the end of the line.
        extra_seconds: expected duration of what follows the last unit.
        start: time at which the activity began.
        drawn_at: time of the last drawing, set by the console.
    """

    stage: str
    on_change: Callable[[], None]
    total: int | None = None
    unit: str = ""
    activity: str = ""
    n: int = 0
    note: str = ""
    extra_seconds: float = 0.0
    start: float = field(default_factory=lambda: monotonic())
    drawn_at: float = 0.0
    _begin: tuple[float, int] | None = None  # time and count from which the rate is measured
    _counted_at: float = 0.0  # time of the last unit
    _text_widths: list[int] = field(default_factory=lambda: [0, 0, 0])  # longest text so far, by the parts left out

    def begin(self, seconds: float = 0.0) -> None:
        """Measure the rate from now on, or from `seconds` ago; without effect after the first call."""
        if self._begin is None:
            self._begin, self._counted_at, self.activity = (monotonic() - seconds, self.n), monotonic(), ""

    def update(self, number: int, seconds: float | None = None) -> None:
        """Count units.

        Args:
            number: further units.
            seconds: how long work on them took; if the stage has not begun, it began then. None: it begins now.
        """
        if seconds is not None:
            self.begin(seconds)
        self.move_to(self.n + number)
        if number:
            self.begin()

    def move_to(self, number: int) -> None:
        """Set the number of units that are done, for example at the start of a resumed run."""
        if number != self.n:
            self.n, self._counted_at = number, monotonic()
        self.on_change()

    def set_note(self, note: str) -> None:
        """Set the text at the end of the line."""
        self.note = note
        self.on_change()

    def set_activity(self, activity: str) -> None:
        """Set the activity that is shown in place of the rate; empty for the counted one."""
        if activity != self.activity:
            self.activity, self.start = activity, monotonic()
            if not self.n:
                self.drawn_at = 0.0  # each activity of the start is shown once
            self.on_change()

    @property
    def rate(self) -> float | None:
        """Units per second up to the last unit; None until it is known: of the first second nothing is concluded."""
        if self._begin is None:
            return None
        seconds, number = self._counted_at - self._begin[0], self.n - self._begin[1]
        return number / seconds if number > 0 and seconds >= MIN_SECONDS else None

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds until the end of the stage; None while they are unknown, and when they are over."""
        if not self.total or self.rate is None:
            return None
        seconds = (self.total - self.n) / self.rate + self.extra_seconds - (monotonic() - self._counted_at)
        return seconds if seconds > 0 else None

    def line(self, width: int | None = None, blocks: str = "━─") -> str:
        """Return the line.

        Args:
            width: number of characters at most; what matters least is left out. None: no limit, and no bar.
            blocks: characters of the bar's parts that are done and to be done.

        Returns:
            The line.
        """
        percent = f"{self.n / self.total:4.0%}" if self.total and (self.n or not self.activity) else ""
        left = "" if self.seconds_left is None else f"{_format_seconds(self.seconds_left)} left"
        if self.activity or not self.total:
            name = f"{self.activity or self.stage} … {_format_seconds(monotonic() - self.start)}"
            parts = [self.stage if self.activity else "", percent, name, left, self.note]
            return _cut(_GAP.join(filter(None, parts)), width)
        count = f"{self.n:,}/{plural(self.total, self.unit)}"
        rate = "" if self.rate is None else _format_rate(self.rate)
        if width is None:
            return _GAP.join(filter(None, [self.stage, percent, count, rate, left, self.note]))
        line, room = "", 0
        for part, optional in enumerate(((count, rate), (count, ""), ("", ""))):
            line = _GAP.join(filter(None, [percent, *optional, left, self.note]))
            # The bar keeps its length while numbers become shorter.
            self._text_widths[part] = max(self._text_widths[part], len(line))
            room = width - len(self.stage) - 2 * len(_GAP) - self._text_widths[part]
            if room >= BAR_WIDTHS[0]:
                break
        bar = "" if room < BAR_WIDTHS[0] else self._bar(min(room, BAR_WIDTHS[1]), blocks)
        return _cut(_GAP.join(filter(None, [self.stage, bar, line])), width)

    def _bar(self, width: int, blocks: str) -> str:
        done = int(width * min(1.0, self.n / self.total)) if self.total else 0
        return blocks[0] * done + blocks[1] * (width - done)


def _cut(line: str, width: int | None) -> str:
    return line if width is None else shorten(line, width)


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 59.5 else format_duration(max(seconds, 60.0))


def _format_rate(rate: float) -> str:
    if rate < 1:
        return f"{format_duration(1 / rate)} each"
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
