"""Items are computed one ahead, in order; errors and early ends leave no thread behind."""

import threading
from collections.abc import Iterator

import pytest

from raybge.util.lookahead import computed_ahead


def test_the_next_item_is_computed_while_one_is_used():
    started = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for number, event in enumerate(started):
            event.set()
            yield number

    seen = []
    for number in computed_ahead(items()):
        seen.append(number)
        if number < 3:
            assert started[number + 1].wait(60)
        assert not any(event.is_set() for event in started[number + 2 :])  # and no more than one
    assert seen == [0, 1, 2, 3]


def test_an_error_is_raised_after_the_items_before_it():
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    ahead = computed_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken"):
        next(ahead)


def test_an_early_end_stops_the_thread():
    before = threading.active_count()
    ahead = computed_ahead(iter(range(9)))
    assert next(ahead) == 0 and threading.active_count() == before + 1
    ahead.close()
    assert threading.active_count() == before


def test_no_item():
    assert list(computed_ahead([])) == []
