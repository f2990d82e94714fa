"""Text samples: spread over all data, of the requested length, and reproducible."""

import gzip
import json
from pathlib import Path

import pytest

from raybge.data.groups import parse_passage
from raybge.data.source_files import list_files
from raybge.data.survey import Survey, survey
from raybge.data.text_sample import MOST, PARTS, sample_texts


def surveyed(folder: Path, texts: list[str], block_bytes: int) -> Survey:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return survey(list_files(str(folder), "--train_data"), block_bytes, parse_passage)


def numbers(sample: list[str]) -> list[int]:
    return sorted(int(text[:4]) for text in sample)


@pytest.fixture
def long(tmp_path) -> Survey:
    """Return a survey of 5,000 texts, ten per block."""
    return surveyed(tmp_path, [f"{i:04} {'x' * 15}" for i in range(5000)], 330)


def test_few_texts_are_all_sampled(tmp_path):
    texts = [f"{i:04}" for i in range(100)]
    assert numbers(sample_texts(surveyed(tmp_path, texts, 200), parse_passage, 100)) == list(range(100))


def test_a_block_contributes_its_share(long):
    """A share has 25 characters: three texts that are cut to ten."""
    sample = sample_texts(long, parse_passage, longest=10, characters=PARTS * 25)
    assert sample == sample_texts(long, parse_passage, longest=10, characters=PARTS * 25)
    assert {len(text) for text in sample} == {10}
    assert 0 <= sum(map(len, sample)) - PARTS * 25 < 10
    sample = numbers(sample)
    assert max(later - sooner for sooner, later in zip([0, *sample], [*sample, 5000], strict=True)) < 5000 / 8


def test_small_blocks_fill_the_sample_and_not_all_are_read(long):
    """The ten texts of a block are a fifth of a share."""
    full = sample_texts(long, parse_passage, longest=20, characters=PARTS * 1000 // 2)
    assert 0 <= sum(map(len, full)) - PARTS * 500 < 20
    assert len(sample_texts(long, parse_passage, longest=20, characters=1 << 30)) == pytest.approx(10 * MOST, rel=0.02)


@pytest.mark.parametrize("packed", [False, True])
def test_invalid_rows_and_empty_blocks_are_skipped(tmp_path, packed):
    lines = ['{"text": "good"}\n', "no row\n" * 80 * MOST, '{"text": "too"}\n']
    path = tmp_path / ("texts.jsonl.gz" if packed else "texts.jsonl")
    path.write_bytes(gzip.compress("".join(lines).encode()) if packed else "".join(lines).encode())
    sample = survey(list_files(str(path), "--train_data"), 100, parse_passage, "skip")
    assert packed or len(sample.blocks) > 4 * MOST
    assert sorted(sample_texts(sample, parse_passage, 100)) == ["good", "too"]


def test_each_file_is_sampled(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps({"text": f"{i:04}"}) + "\n")
    sample = survey(list_files(str(tmp_path), "--train_data"), 1 << 20, parse_passage)
    assert numbers(sample_texts(sample, parse_passage, 100)) == list(range(40))
