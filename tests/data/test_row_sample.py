"""Sample of the training rows: lengths against a direct count over all rows."""

import json

import pytest

from raybge.data import row_sample
from raybge.data.groups import parse_group, parse_passage
from raybge.data.row_sample import TextLengths, sample_rows
from raybge.data.source_files import list_files
from raybge.data.survey import survey


def words(texts):
    return [len(text.split()) for text in texts]


def surveyed(path, rows, parse, block_bytes=1 << 20):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return survey(list_files(str(path), "--f"), block_bytes, parse)


def test_lengths_of_all_rows_of_a_small_file(tmp_path):
    rows = [{"query": "a b", "pos": ["c " * n], "neg": ["d"] * (n % 3)} for n in range(1, 31)]
    sample = sample_rows(surveyed(tmp_path / "f.jsonl", rows, parse_group), parse_group, words)
    assert sample.rows == 30
    assert sample.lengths == [
        TextLengths("query", 30, 2, 2.0, 2),
        TextLengths("positive", 30, 1, pytest.approx(15.5), 30),
        TextLengths("negative", 30, 1, 1.0, 1),
    ]
    assert sample.examples[0] == {"query": "a b", "positive": "c ", "negative": "d"} and len(sample.examples) == 3


def test_texts_without_queries(tmp_path):
    rows = [{"text": "a"}, {"text": "a b c"}]
    sample = sample_rows(surveyed(tmp_path / "f.jsonl", rows, parse_passage), parse_passage, words)
    assert sample.lengths == [TextLengths("text", 2, 1, 2.0, 3)] and sample.examples == rows


def test_a_large_file_is_sampled_from_all_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(row_sample, "ROWS", 16)
    rows = [{"text": f"x{i}"} for i in range(2000)]
    seen = []

    def numbers(texts):
        seen.extend(int(text[1:]) for text in texts)
        return words(texts)

    data = surveyed(tmp_path / "f.jsonl", rows, parse_passage, block_bytes=2000)
    assert sample_rows(data, parse_passage, numbers).rows == len(seen) == 16
    assert min(seen) == 0 and max(seen) > 1700 and len({n // 250 for n in seen}) >= 6
