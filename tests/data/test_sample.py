"""A sample is spread over all of the data, has no more than it is to have, and is the same each time."""

import gzip
import json
from pathlib import Path

import pytest

from raybge.data.files import list_files
from raybge.data.groups import parse_passage
from raybge.data.sample import PARTS, sample_texts
from raybge.data.survey import Survey, survey


def surveyed(folder: Path, texts: list[str], block_bytes: int) -> Survey:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return survey(list_files(str(folder / "texts.jsonl"), "--train_data"), block_bytes, parse_passage)


def test_a_few_texts_are_all_in_it(tmp_path):
    texts = [f"row {i}" for i in range(100)]
    assert sample_texts(surveyed(tmp_path, texts, 1 << 20), parse_passage, 100) == texts


def test_it_is_spread_over_many_blocks_and_cut(tmp_path):
    texts = [f"{i:04} {'x' * 20}" for i in range(5000)]
    found = surveyed(tmp_path, texts, 200)
    assert len(found.blocks) > 10 * PARTS
    sample = sample_texts(found, parse_passage, longest=10, characters=PARTS * 25)
    assert {len(text) for text in sample} == {10}
    numbers = [int(text[:4]) for text in sample]
    assert len(numbers) == 3 * PARTS  # two are below a part's share, the third is beyond it
    assert numbers == sorted(numbers) and numbers[0] == 0
    gaps = [later - sooner for sooner, later in zip(numbers[::3], numbers[3::3], strict=False)]
    assert max(gaps) < 1.2 * 5000 / (PARTS - 1) and min(gaps) > 0.8 * 5000 / (PARTS - 1)
    assert sample == sample_texts(found, parse_passage, longest=10, characters=PARTS * 25)


@pytest.mark.parametrize("packed", [False, True])
def test_bad_rows_and_empty_blocks_are_passed_over(tmp_path, packed):
    lines = ['{"text": "good"}\n', "no row\n" * 200, '{"text": "too"}\n']
    path = tmp_path / ("texts.jsonl.gz" if packed else "texts.jsonl")
    path.write_bytes(gzip.compress("".join(lines).encode()) if packed else "".join(lines).encode())
    found = survey(list_files(str(path), "--train_data"), 100, parse_passage, "skip")
    assert sample_texts(found, parse_passage, 100) == ["good", "too"]
