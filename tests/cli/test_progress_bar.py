"""Progress bars: rate, time left and width; and line breaks of the texts above them."""

import pytest
from screens import console_on

from raybge.cli.progress_bar import ProgressBar
from raybge.cli.terminal import wrapped


def test_rate_excludes_the_start_and_a_first_second_says_nothing(monkeypatch):
    with console_on(100, monkeypatch) as (console, _, clock):
        with console.bar("encode", 100, "text", start_up="loading") as bar:
            clock.wait(60)
            bar.update(10, 0.5)  # the block took half a second, the start 59.5
            assert bar.rate is None and bar.seconds_left is None
            clock.wait(1.5)
            bar.update(10)
            assert bar.rate == 10 and bar.seconds_left == 8
            clock.wait(3)
            assert bar.rate == 10 and bar.seconds_left == 5  # the rate waits for the next block, the end does not
        assert console.rates == {"encode": 10}


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 140])
def test_a_bar_fits_every_width(columns):
    bar = ProgressBar("train", lambda: None, 1_234_567, "group", note="loss 0.1234, step 12,345/99,999")
    bar.begin(3600.0)
    for number in (1, 400_000, 833_000):
        bar.update(number)
        line = bar.line(columns)
        assert len(line) <= columns and ("left" in line or columns < 80)
        assert columns < 100 or "━" in line or "─" in line


def test_text_is_broken_between_words_but_commands_are_not():
    text = (
        "saved checkpoint-4 of a run that was interrupted; continue with:\n  python -m raybge.train --flag value value"
    )
    assert wrapped(text, 40).split("\n") == [
        "saved checkpoint-4 of a run that was",
        "    interrupted; continue with:",
        "  python -m raybge.train --flag value value",
    ]
    assert wrapped("written: /a/path/that/is-longer-than/the/terminal", 20).endswith(
        "/a/path/that/is-longer-than/the/terminal"
    )
