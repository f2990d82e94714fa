"""Mining with --rescore on one Ray, against plain numpy over the whole pool: the order of fp32 among candidates of a
cheap model, whose vectors have one bit per number here.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import stub

from raybge.cli.console import Console
from raybge.cli.options import MineOptions
from raybge.cli.parser import build_options
from raybge.mining.rescoring import changed_ranks, search_depth
from raybge.mining.run import mine
from raybge.search import inputs

POOL = [f"passage {i}" for i in range(300)]
ROWS = [{"query": f"query {i}", "pos": [POOL[i], POOL[i + 100]]} for i in range(40)]
LO, HI, NUMBER = 3, 40, 8

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 700)


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def mined(folder: Path, exact=True, cheap=True, own_pool=False, **flags) -> tuple[bytes, dict]:
    """Mine in a new folder; return the file and the counts."""
    folder.mkdir()
    values = {
        "range_for_sampling": f"{LO}-{HI}",
        "negative_number": NUMBER,
        "num_workers": 2,
        "shard_size": 70,
        **flags,
    }
    values["input_file"] = write(folder / "rows.jsonl", ROWS)
    if not own_pool:
        values["corpus_data"] = write(folder / "pool.jsonl", [{"text": text} for text in POOL])
    options = build_options(MineOptions, {**values, "output_file": str(folder / "mined.jsonl"), "rescore": exact})
    embedder = stub.coarse_embedder() if cheap else stub.embedder()
    result = mine(options, Console(), embedder, stub.embedder() if exact else None)
    return (folder / "mined.jsonl").read_bytes(), dict(result.counts)


def vectors(encoder: type, texts: list[str]) -> np.ndarray:
    return encoder(None, 0.0, stub.DIM, "cpu").encode_corpus(texts)


def by_score(score_P: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return ids by score, then id."""
    return np.array(sorted(ids.tolist(), key=lambda i: (-score_P[i], i)))


@pytest.fixture(scope="module")
def rankings() -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Return each query's candidates by cheap score and by fp32 score, and the fp32 scores of all passages."""
    queries = [row["query"] for row in ROWS]
    cheap_QP = vectors(stub.CoarseEncoder, queries) @ vectors(stub.CoarseEncoder, POOL).T
    exact_QP = vectors(stub.StubEncoder, queries) @ vectors(stub.StubEncoder, POOL).T
    cheap = [by_score(score_P, np.arange(300))[: search_depth(HI)] for score_P in cheap_QP]
    return cheap, [by_score(s, ids) for s, ids in zip(exact_QP, cheap, strict=True)], exact_QP


@pytest.mark.parametrize("own_pool", [False, True], ids=["pool", "own"])
def test_negatives_are_those_of_a_slow_reference(rankings, tmp_path, own_pool):
    cheap, exact, score_QP = rankings
    own = np.array([POOL.index(text) for row in ROWS for text in row["pos"]])  # in the order of the pool of `own`
    flags = {"sampling_strategy": "top", "absolute_margin": 0.2, "keep_scores": True}
    content, _ = mined(tmp_path / "a", own_pool=own_pool, **flags)
    unlike_cheap = 0
    for q, (row, line) in enumerate(zip(ROWS, content.decode().splitlines(), strict=True)):
        out = json.loads(line)
        positive = [score_QP[q, POOL.index(text)] for text in row["pos"]]
        np.testing.assert_allclose(out["pos_scores"], positive, atol=2e-6)
        if own_pool:
            query_D = vectors(stub.CoarseEncoder, [row["query"]])[0]
            cheap_P = vectors(stub.CoarseEncoder, [POOL[i] for i in own]) @ query_D
            first = by_score(cheap_P, np.arange(len(own)))[: search_depth(HI)]
            ranking = own[by_score(score_QP[q, own], first)]
        else:
            ranking = exact[q]
            unlike_cheap += (ranking[LO:HI] != cheap[q][LO:HI]).any()
        wanted = [
            i for i in ranking[LO:HI] if POOL[i] not in row["pos"] and score_QP[q, i] <= min(positive) - np.float32(0.2)
        ][:NUMBER]
        assert out["neg"][: len(wanted)] == [POOL[i] for i in wanted]
        known = [score_QP[q, POOL.index(text)] for text in out["neg"]]
        np.testing.assert_allclose(out["neg_scores"], known, atol=2e-6)  # those of random passages too
    assert own_pool or unlike_cheap == len(ROWS)


def test_share_of_changed_ranks(rankings, tmp_path, capsys):
    cheap, exact, _ = rankings
    _, counts = mined(tmp_path / "a")
    changed = sum(int((a[LO:HI] != b[LO:HI]).sum()) for a, b in zip(cheap, exact, strict=True))
    assert (counts["ranks_rescored"], counts["ranks_changed"]) == (40 * (HI - LO), changed)
    share = changed / (40 * (HI - LO))
    line = f"{share:.1%} of the 1,480 ranks hold another passage after --rescore"
    assert line in capsys.readouterr().out and 0.5 < share < 1
    page = (tmp_path / "a/mined.jsonl.report.html").read_text()
    assert f"{changed:,} ({100 * share:.1f}%)" in page


def test_actors_that_take_more_than_half_of_the_cpus(tmp_path, ray_cluster):
    """Those of the search end before those of the model in fp32 start: both together would wait for ever."""
    cpus = int(ray_cluster.cluster_resources()["CPU"])
    assert cpus >= 3
    large = mined(tmp_path / "large", num_workers=1, cpus_per_worker=cpus // 2 + 1, keep_scores=True)[0]
    assert large == mined(tmp_path / "small", num_workers=2, cpus_per_worker=1, keep_scores=True)[0]


def test_bytes_do_not_depend_on_actors_or_shards(tmp_path):
    """With score limits that few candidates satisfy: random passages are scored too."""
    flags = {"min_score": 0.1, "max_score": 0.45, "keep_scores": True, "negative_number": 30}
    contents = {
        mined(tmp_path / f"{actors}-{shard}", num_workers=actors, shard_size=shard, **flags)[0]
        for actors, shard in ((1, 70), (2, 1000), (3, 64))
    }
    assert len(contents) == 1
    lines = [json.loads(line) for line in contents.pop().splitlines()]
    assert all(0.1 <= score <= 0.45 for line in lines for score in line["neg_scores"])


def test_rescoring_by_the_same_model_changes_nothing(tmp_path):
    flags = {"keep_scores": True, "relative_margin": 0.05}
    plain, _ = mined(tmp_path / "plain", exact=False, cheap=False, **flags)
    rescored, counts = mined(tmp_path / "rescored", cheap=False, **flags)
    assert rescored == plain and counts["ranks_changed"] == 0 < counts["ranks_rescored"]


def test_changed_ranks_count_places_that_hold_a_passage():
    before = np.array([[1, 2, 3], [4, 5, -1]])
    assert changed_ranks(before, np.array([[2, 1, 3], [4, 5, -1]])) == (2, 5)
