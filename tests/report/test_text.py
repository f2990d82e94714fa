"""Formats of the texts of pages and charts."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raybge.report.text import distinct_labels, format_duration, format_value, shell_command, shorten


def test_names_with_a_common_prefix_are_distinct():
    names = ["", "Represent this sentence for search:", "Represent this question for search:", "cosine"]
    assert distinct_labels(names, 16) == ["", "…sentence …arch:", "…question …arch:", "cosine"]
    assert distinct_labels(names[:2], 16) == ["", "Represent …arch:"]
    assert distinct_labels(["a" * 20 + "b", "a" * 20], 9) == ["…b", "…"]


@given(st.text(max_size=30), st.integers(4, 20))
def test_shorten_keeps_both_ends(text, most):
    shortened = shorten(text, most)
    assert len(shortened) <= most and (shortened == text or len(text) > most)
    if len(text) > most:
        assert text.startswith(shortened.split("…")[0][:1]) and text.endswith(shortened[-1])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2e-05, "2e-5"),
        (0.123456, "0.1235"),
        (1e-10, "1e-10"),
        (3e5, "3e5"),
        (64.0, "64"),
        (4096, "4096"),
        (True, "True"),
    ],
)
def test_format_value(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize(
    "value", ["plain", "", "two words", "it's", '"quoted"', "$HOME", "a\\b", "new\nline", "--flag", "*", "查询："]
)
def test_shell_reads_commands_back(value):
    command = ["python", "-m", "raybge.train", "--query_instruction_for_retrieval", value, "--seed", "1"]
    read_back = subprocess.run(
        ["bash", "-c", "python() { printf '%s\\0' python \"$@\"; }\n" + shell_command(command)],
        capture_output=True,
        check=True,
    )
    assert read_back.stdout.decode().split("\0")[:-1] == command


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (12.34, "12.3 s"),
        (59.99, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (3599.9, "1 h"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
