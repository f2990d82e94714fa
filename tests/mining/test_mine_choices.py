"""Mining with rules against false negatives, a cross-encoder, an approximate index and kept work: on one Ray, against
plain numpy over the whole pool.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import stub
from tiny import make_classifier

from raybge.cli.console import Console
from raybge.cli.options import MineOptions
from raybge.cli.parser import build_options
from raybge.mine import main
from raybge.mining.run import mine
from raybge.search import inputs

POOL = [f"passage {i}" for i in range(300)]
LO, HI = 3, 60

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(inputs, "BLOCK_BYTES", 1500)


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Return forty rows; the last five repeat the queries of the first five in another spelling."""
    first = [{"query": f"query {i}", "pos": [POOL[i], POOL[i + 100]]} for i in range(35)]
    return first + [{"query": f"Query  {i}", "pos": [POOL[i + 200]]} for i in range(5)]


@pytest.fixture(scope="module")
def files(rows, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    pool = [{"text": text} for text in [*POOL, "PASSAGE  7"]]  # except for its case, the positive of row 7
    return {
        "input_file": write(folder / "rows.jsonl", rows),
        "corpus_data": write(folder / "pool.jsonl", pool),
    }


def mined(files, output: Path, log: Path | None = None, **flags) -> tuple[list[dict], dict]:
    values = {"range_for_sampling": f"{LO}-{HI}", "negative_number": 8, "num_workers": 2, "shard_size": 70, **flags}
    arguments = build_options(MineOptions, {**files, **values, "output_file": str(output)})
    result = mine(arguments, Console(), stub.embedder(log))
    return read(output), result


def vectors(texts) -> np.ndarray:
    return stub.StubEncoder(None, 0, stub.DIM, "cpu").encode_corpus(texts)


def ranked(query: str) -> list[tuple[str, float]]:
    """Return the whole pool by score, of which ranks LO to HI are candidates."""
    pool = [*POOL, "PASSAGE  7"]
    scores = vectors(pool) @ vectors([query])[0]
    return [(pool[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")]


def known_of(rows: list[dict], row: dict) -> set[str]:
    """Return all positives of the row's query in the file, in any spelling."""
    same = [other for other in rows if other["query"].lower().split() == row["query"].lower().split()]
    return {" ".join(text.lower().split()) for other in same for text in other["pos"]}


def test_top_with_margins(files, rows, tmp_path):
    out_rows, _ = mined(
        files,
        tmp_path / "out.jsonl",
        sampling_strategy="top",
        absolute_margin=0.05,
        relative_margin=0.1,
        max_score=0.3,
        min_score=-0.2,
        keep_scores=True,
    )
    cut = short = 0
    for row, out in zip(rows, out_rows, strict=True):
        positives = vectors(row["pos"]) @ vectors([row["query"]])[0]
        limit = min(0.3, (positives - 0.05).min(), (positives - 0.1 * np.abs(positives)).min())
        known = known_of(rows, row)
        allowed = [(text, s) for text, s in ranked(row["query"]) if text.lower().split() and -0.2 <= s <= limit]
        allowed = [(text, s) for text, s in allowed if " ".join(text.lower().split()) not in known]
        in_range = {text for text, _ in ranked(row["query"])[LO:HI]}
        expected = [text for text, _ in allowed if text in in_range][:8]
        assert out["neg"][: len(expected)] == expected
        assert set(out["neg"]) <= {text for text, _ in allowed} and len(set(out["neg"])) == len(out["neg"])
        cut += len(expected) < 8
        short += len(out["neg"]) < 8
        np.testing.assert_allclose(out["pos_scores"], positives, atol=2e-6)
        np.testing.assert_allclose(out["neg_scores"], vectors(out["neg"]) @ vectors([row["query"]])[0], atol=2e-6)
    assert 0 < cut < len(rows) and short < len(rows)


def test_the_strong_preset_equals_its_flags(files, tmp_path):
    strong = {"sampling_strategy": "top", "relative_margin": 0.05, "keep_scores": True, "range_for_sampling": "0-200"}
    mined(files, tmp_path / "flags.jsonl", **strong)
    mined(files, tmp_path / "preset.jsonl", preset="strong", range_for_sampling=None)
    assert (tmp_path / "preset.jsonl").read_bytes() == (tmp_path / "flags.jsonl").read_bytes()


def test_shared_positives_and_their_spellings_are_never_negatives(files, rows, tmp_path):
    """With as many negatives as the pool holds, every allowed passage is one."""
    out_rows, result = mined(files, tmp_path / "out.jsonl", range_for_sampling="0-301", negative_number=400)
    for row, out in zip(rows, out_rows, strict=True):
        known = known_of(rows, row)
        assert set(out["neg"]) == {
            text for text in [*POOL, "PASSAGE  7"] if " ".join(text.lower().split()) not in known
        }
    assert len(known_of(rows, rows[0])) == 3 and result.counts["rows_with_fewer"] == 40


def test_scores_are_equal_with_the_groups_own_pool(rows, tmp_path):
    """Without corpus_data the positives' vectors are those of the pool, with one they are encoded with the query.
    Where the pool has other spellings of a positive, its own vector counts.
    """
    spelled = [{**row, "neg": [row["pos"][0].upper(), f" {row['pos'][0]}"]} for row in rows]
    own = {"input_file": write(tmp_path / "rows.jsonl", spelled)}
    values = {"keep_scores": True, "range_for_sampling": "0-60", "relative_margin": 0.05, "negative_number": 3}
    out_rows, _ = mined(own, tmp_path / "own.jsonl", **values)
    for row, out in zip(rows, out_rows, strict=True):
        np.testing.assert_allclose(out["pos_scores"], vectors(row["pos"]) @ vectors([row["query"]])[0], atol=2e-6)
        assert all(score <= 0.95 * min(out["pos_scores"]) or min(out["pos_scores"]) < 0 for score in out["neg_scores"])


def test_cross_encoder_scores_are_used_and_written(files, rows, tmp_path, capfd):
    from raybge.model.reranker import Reranker

    cross_encoder = make_classifier(tmp_path / "cross_encoder")
    reranker = Reranker(cross_encoder, devices="cpu")
    out_rows, _ = mined(
        files,
        tmp_path / "out.jsonl",
        cross_encoder=cross_encoder,
        sampling_strategy="top",
        absolute_margin=0.0,
        allow_unknown_tokens=True,
    )
    for row, out in zip(rows, out_rows, strict=True):
        pairs = [(row["query"], text) for text in (*row["pos"], *out["neg"])]
        np.testing.assert_allclose([*out["pos_scores"], *out["neg_scores"]], reranker.compute_score(pairs), atol=1e-5)
        assert max(out["neg_scores"], default=-9) <= min(out["pos_scores"]) + 1e-6
    plain = write(
        tmp_path / "plain.jsonl", [{**row, "neg": out["neg"]} for row, out in zip(rows, out_rows, strict=True)]
    )
    scored = tmp_path / "scored.jsonl"
    argv = ["--score_only", "--cross_encoder", cross_encoder, "--input_file", plain, "--output_file", str(scored)]
    argv += ["--allow_unknown_tokens"]
    assert main([*argv, "--num_workers", "2"]) == 0
    for row, out in zip(read(scored), out_rows, strict=True):
        assert row["neg"] == out["neg"] and row["query"] == out["query"]
        np.testing.assert_allclose(row["neg_scores"], out["neg_scores"], atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("cross_encoder", "plain.jsonl", "scored.jsonl", "scored.jsonl.meta.json", "out.jsonl", "out.jsonl.meta.json"),
        *("scored.jsonl.report.html", "out.jsonl.report.html"),
    }


def test_work_under_a_storage_path_is_reused(files, tmp_path):
    log, storage = tmp_path / "log", tmp_path / "kept"
    first, _ = mined(files, tmp_path / "1.jsonl", log, storage_path=str(storage), seed=1)
    encoded = log.read_text().splitlines()
    assert len(encoded) == len(set(encoded)) > 4
    again, _ = mined(files, tmp_path / "2.jsonl", log, storage_path=str(storage), seed=1, shards_per_actor=1)
    other, _ = mined(files, tmp_path / "3.jsonl", log, storage_path=str(storage), seed=2)
    assert log.read_text().splitlines() == encoded and first == again != other
    anew, _ = mined(files, tmp_path / "1.jsonl", log, storage_path=str(storage), seed=1, overwrite=True, num_workers=1)
    assert log.read_text().splitlines() == encoded and anew == first


def test_interrupted_overwriting_run_continues(files, tmp_path, monkeypatch):
    log, output = tmp_path / "log", tmp_path / "out.jsonl"
    work = tmp_path / "out.jsonl.work"
    first, _ = mined(files, output, log)
    blocks = encoded(log)

    def stopped(**flags) -> None:
        with monkeypatch.context() as changed, pytest.raises(MemoryError):
            changed.setattr("raybge.mining.run.search", lambda *arguments, **keywords: raise_(MemoryError()))
            mined(files, output, log, **flags)
        assert work.exists()

    stopped(overwrite=True, seed=1)
    assert encoded(log) == blocks + blocks  # nothing was left of the finished run
    dry = mined(files, output, log, overwrite=True, dry_run=True)[1]
    assert dry.counts and not dry.report and work.exists() and read(output) == first
    assert not mined(files, output, log)[1].counts and work.exists()
    again, _ = mined(files, output, log, overwrite=True, seed=1)
    assert encoded(log) == blocks + blocks and again != first and not work.exists()
    output.unlink()
    stopped()
    mined(files, output, log, overwrite=True)  # there is no output: the work itself is discarded
    assert encoded(log) == blocks + blocks + blocks + blocks


def encoded(log: Path) -> Counter[str]:
    """Count how often each block was encoded."""
    return Counter(log.read_text().splitlines())


def raise_(error: Exception) -> None:
    raise error


def test_approximate_index_reports_recall(files, tmp_path, capfd):
    exact, _ = mined(files, tmp_path / "exact.jsonl", sampling_strategy="top")
    out_rows, result = mined(files, tmp_path / "out.jsonl", sampling_strategy="top", index_factory="IVF8,Flat")
    assert 0.05 < result.recall < 1 and out_rows != exact
    assert f"--index_factory IVF8,Flat finds {result.recall:.1%} of the 60 nearest passages" in capfd.readouterr().out
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["counts"]["recall"] == result.recall and meta["options"]["index_factory"] == "IVF8,Flat"


def test_metadata_file(files, rows, tmp_path, capfd):
    out_rows, _ = mined(files, tmp_path / "out.jsonl", keep_scores=True)
    first = (tmp_path / "out.jsonl.meta.json").read_text()
    meta = json.loads(first)
    assert meta["options"]["seed"] == 42 and meta["embedder"] == "stub" and meta["counts"]["rows"] == 40
    assert {"raybge", "ray", "torch", "numpy"} <= set(meta["versions"])
    counted = meta["scores"]["negatives"]
    scores = np.array([score for out in out_rows for score in out["neg_scores"]])
    assert sum(counted.values()) == len(scores)
    for start, count in counted.items():
        assert abs(int(((scores >= float(start)) & (scores < float(start) + 0.05)).sum()) - count) <= 1
    console = capfd.readouterr().out
    assert f"query  {rows[0]['query']}" in console and f"neg    {out_rows[0]['neg'][0]}" in console


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"relative_margin": -0.1}, "--relative_margin must be at least 0, found -0.1"),
        ({"min_score": 0.5, "max_score": 0.1}, "--min_score 0.5 is above --max_score 0.1"),
        ({"sampling_strategy": "best"}, "--sampling_strategy"),
        ({"score_only": True}, "--score_only requires --cross_encoder"),
        ({"normalize_scores": True}, "--normalize_scores requires --cross_encoder"),
        ({"score_only": True, "cross_encoder": "x", "keep_scores": True}, "--keep_scores: --score_only mines nothing"),
        ({"shards_per_actor": 0}, "--shards_per_actor must be at least 1"),
        ({"index_factory": "Flta"}, "--index_factory Flta: faiss cannot build this index"),
    ],
)
def test_invalid_flags_are_named(files, tmp_path, tiny_model, capfd, monkeypatch, flags, message):
    monkeypatch.setattr("raybge.cluster.spec.connect", lambda *arguments: pytest.fail("Ray was asked for"))
    values = {**files, "model_name_or_path": tiny_model, "output_file": tmp_path / "out.jsonl", **flags}
    if "score_only" in flags:
        del values["corpus_data"]
    assert main([str(word) for name, value in values.items() for word in (f"--{name}", value)]) == 2
    captured = capfd.readouterr()
    assert message in captured.err and not list(tmp_path.iterdir())


def test_cross_encoder_that_is_no_sequence_classifier_is_named(files, tmp_path, tiny_model, capfd):
    values = {**files, "model_name_or_path": tiny_model, "output_file": tmp_path / "out", "cross_encoder": tiny_model}
    assert main([str(word) for name, value in values.items() for word in (f"--{name}", value)]) == 2
    assert "--cross_encoder" in capfd.readouterr().err
