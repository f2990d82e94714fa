"""Mining end to end on one Ray: candidates equal one exact search, the same bytes for any number of actors, and each
trap of the reference tool.
"""

import gzip
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest

from raybge import mine_hard_negatives
from raybge.mine import main
from raybge.search import inputs
from raybge.util.errors import UserError

LO, HI, NUMBER = 2, 12, 10  # as many negatives as ranks: a row without a positive in the range gets all of them


@pytest.fixture(scope="module")
def data(tmp_path_factory, words):
    """Write groups and a pool of several blocks, with duplicates, an unusual row and further fields."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, rng.integers(3, 9))) for _ in range(300)]
    pool = [texts[i] for i in rng.permutation(300)] + texts[:20]
    rows = [
        {"id": i, "query": " ".join(rng.choice(words, 3)), "pos": [texts[i], texts[i + 1]], "neg": ["old"], "é": 1.5}
        for i in range(118)
    ]
    rows.append({"query": texts[7], "pos": texts[8], "prompt": "ak", "type": None})  # the query is in the pool
    rows.append({"pos": [texts[9]], "neg": [], "query": "bk 日本 \u2028 bl"})
    folder = tmp_path_factory.mktemp("data")
    write(folder / "groups.jsonl", rows)
    write(folder / "pool.jsonl", [{"text": text} for text in pool])
    return folder, rows, pool


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def mined(ray_cluster, data, tiny_model, tmp_path_factory):
    """Return (bytes, result) by (actors, passages per shard)."""
    folder = tmp_path_factory.mktemp("mined")
    outputs, pages = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "BLOCK_BYTES", 2048)
        for actors, shard in ((1, 64), (2, 1000), (3, 64)):
            output = folder / f"{actors}-{shard}" / "mined.jsonl"
            result = mine_hard_negatives(
                model_name_or_path=tiny_model,
                input_file=str(data[0] / "groups.jsonl"),
                corpus_data=str(data[0] / "pool.jsonl"),
                output_file=str(output),
                range_for_sampling=f"{LO}-{HI}",
                negative_number=NUMBER,
                num_workers=actors,
                shard_size=shard,
                passage_instruction_for_retrieval="al",
                passage_instruction_format="{} {}",
            )
            outputs[actors, shard] = output.read_bytes(), result
            assert {path.name for path in output.parent.iterdir()} == {
                f"mined.jsonl{ending}" for ending in ("", ".meta.json", ".report.html")
            }
            pages[actors, shard] = (output.parent / "mined.jsonl.report.html").read_text()
    assert all(chosen(page) == chosen(pages[1, 64]) for page in pages.values())
    outputs["page"] = pages[1, 64]
    return outputs


def chosen(page: str) -> str:
    """Return the report's sections about the negatives, without times and flags."""
    return page[page.index("<h2>Scores") : page.index("<h2>Time")]


def test_report_agrees_with_output(mined, data):
    page, (_, result) = mined["page"], mined[1, 64]
    assert f"120 rows with {NUMBER} negatives" in page and "groups.jsonl" in page and "pool.jsonl" in page
    negatives, random = (
        int(n.replace(",", "")) for n in re.search(r"([\d,]+) chosen.*?([\d,]+) random negatives", page).groups()
    )
    assert negatives + random == 120 * NUMBER and random >= result.counts["rows_filled"] > 0
    assert f"{random:,} more are random passages" in page
    rows = zip(data[1], read_lines(mined), strict=True)
    every = {" ".join(text.split()) for row, out in rows for text in (row["query"], *out["neg"])}
    shown = re.findall(r"<h3>(.*?)</h3>.*?<h4>negative</h4><p>(.*?)</p>", page, re.DOTALL)
    assert len(shown) == 20
    assert sorted({html.unescape(text) for each in shown for text in each} - every) == []


def test_bytes_do_not_depend_on_actors_or_shards(mined):
    assert mined[1, 64][0] == mined[2, 1000][0] == mined[3, 64][0]


def test_candidates_equal_one_exact_search(mined, data, tiny_model):
    from raybge.model.encoder import Encoder

    _, rows, pool = data
    pool = list(dict.fromkeys(pool))
    encoder = Encoder(
        tiny_model,
        devices="cpu",
        passage_instruction_for_retrieval="al",
        passage_instruction_format="{} {}",
        query_instruction_format="{}{}",
    )
    p_PD = encoder.encode_corpus(pool)
    texts = [encoder.query_text(row["query"], row.get("prompt")) for row in rows]
    scores_QP = encoder.encode_queries(texts) @ p_PD.T
    cut = 0
    for row, ranking, out in zip(rows, np.argsort(-scores_QP, axis=1, kind="stable"), read_lines(mined), strict=True):
        known = {row["query"], *([row["pos"]] if isinstance(row["pos"], str) else row["pos"])}
        wanted = [pool[i] for i in ranking[LO:HI] if pool[i] not in known]
        cut += len(wanted) < NUMBER
        assert set(wanted) <= set(out["neg"]) and len(set(out["neg"])) == NUMBER
        assert not known & set(out["neg"]) and set(out["neg"]) <= set(pool)
    assert 0 < cut == mined[1, 64][1].counts["rows_filled"] < len(rows)  # some rows had a positive in the range


def read_lines(mined):
    return [json.loads(line) for line in mined[1, 64][0].decode().split("\n") if line]


def test_rows_keep_order_and_other_fields(mined, data):
    for row, out in zip(data[1], read_lines(mined), strict=True):
        assert {**out, "neg": 0} == {**row, "neg": 0}
        assert list(out) == list(row) + ([] if "neg" in row else ["neg"])
    assert "日本" in mined[1, 64][0].decode()  # as text, not escaped


def test_result_counts(mined, data):
    result = mined[3, 64][1]
    counts = dict(result.counts)
    assert counts.pop("rows_filled") > 0
    assert counts == {"rows": 120, "passages": 300, "duplicates": 20, "rows_with_fewer": 0, "bad_rows": 0}
    assert {"deduplicate", "encode", "index", "search"} == set(result.seconds)
    assert result.report == f"{result.output_file}.report.html" and result.recall is None


def test_small_pool_is_used_up_and_reported(ray_cluster, tiny_model, tmp_path, capfd):
    """No corpus_data, a range beyond the pool, too few passages, a skipped bad row, gzip input and output."""
    rows = [
        {"query": "ak", "pos": ["bk", "ck"], "neg": ["dk"]},
        {"query": 3, "pos": ["never"]},
        {"query": "ek", "pos": "fk"},
        {"query": "gk", "pos": ["ek"], "neg": None},
    ]
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    output = tmp_path / "new" / "folder" / "out.jsonl.gz"
    argv = ["--model_name_or_path", tiny_model, "--input_file", str(source), "--output_file", str(output)]
    argv += ["--range_for_sampling", "1-200", "--negative_number", "4", "--on_bad_rows", "skip", "--num_workers", "1"]
    assert main(argv) == 0
    message = capfd.readouterr().out
    assert "in.jsonl.gz:2" in message and '"query"' in message
    assert "--range_for_sampling 1-200 exceeds the pool of 5 passages: 1-5 is used" in message
    assert "\n3 rows with up to 4 negatives each\n1 invalid row skipped\n" in message
    assert "2 rows with fewer negatives: the pool has no more passages" in message
    out_rows = [json.loads(line) for line in gzip.decompress(output.read_bytes()).splitlines()]
    pool = {"bk", "ck", "dk", "fk", "ek"}
    # neither a positive nor the query (which is the third row's positive), each once
    assert [set(row["neg"]) for row in out_rows] == [pool - {"bk", "ck"}, pool - {"ek", "fk"}, pool - {"ek"}]
    assert [len(row["neg"]) for row in out_rows] == [3, 3, 4]

    before = output.read_bytes()
    assert main(argv) == 0  # finished: nothing is done
    assert "exists already" in capfd.readouterr().out and output.read_bytes() == before
    assert main([*argv, "--overwrite", "--dry_run"]) == 0
    message = capfd.readouterr().out
    assert "mean pooling, normalized (the model's folder)" in message and "1 actor of 1 CPU" in message
    assert "3 rows in 1 file; pool of 5 passages (0 duplicates dropped) in 1 shard" in message
    assert output.read_bytes() == before and {p.name for p in output.parent.iterdir()} == {
        output.name,
        f"{output.name}.meta.json",
        f"{output.name}.report.html",
    }


def test_range_beyond_the_pool_is_refused(ray_cluster, data, tiny_model, tmp_path, capfd):
    assert main(flags(tiny_model, data, tmp_path, range_for_sampling="300-310")) == 2
    assert "--range_for_sampling 300-310 is empty: the pool has 300 passages" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (OSError, 1), (UserError, 2)])
def test_stopped_run_leaves_old_output_unchanged(ray_cluster, data, tiny_model, tmp_path, monkeypatch, error, code):
    def fail(*arguments):
        raise error("stopped")

    monkeypatch.setattr("raybge.mining.run.encode", fail)
    old = write(tmp_path / "out.jsonl", [{"old": 1}])
    assert main([*flags(tiny_model, data, tmp_path), "--overwrite"]) == code
    assert {path.name for path in tmp_path.iterdir()} == {old.name, f"{old.name}.work"}
    assert read(old) == [{"old": 1}]


def test_broken_model_is_named_without_traceback(ray_cluster, data, tiny_model, tmp_path, capfd):
    """Only its actors read the weights, and find one that is no number."""
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert main(flags(str(broken), data, tmp_path / "out")) == 2
    error = capfd.readouterr().err
    assert f"raybge.mine: the model {broken}: 1 of " in error and "word_embeddings.weight are NaN" in error


def flags(model, data, folder, **changed):
    values = {
        "model_name_or_path": model,
        "input_file": str(data[0] / "groups.jsonl"),
        "corpus_data": str(data[0] / "pool.jsonl"),
        "output_file": str(folder / "out.jsonl"),
        "num_workers": "1",
    }
    return [word for name, value in {**values, **changed}.items() for word in (f"--{name}", str(value))]


# --- bad input: without Ray -------------------------------------------------------------------------------


@pytest.fixture
def no_ray(monkeypatch):
    def connect(*arguments):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("raybge.cluster.spec.connect", connect)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"range_for_sampling": "200-2"}, "--range_for_sampling takes two ranks"),
        ({"range_for_sampling": "0-0"}, "--range_for_sampling takes two ranks"),
        ({"range_for_sampling": "10"}, "--range_for_sampling takes two ranks"),
        ({"range_for_sampling": "2-" + "9" * 5000}, "--range_for_sampling takes two ranks"),
        ({"negative_number": 0}, "--negative_number must be at least 1"),
        ({"search_batch_size": 0}, "--search_batch_size must be at least 1"),
        ({"shard_size": 0}, "--shard_size must be at least 1"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"query_max_len": 0}, "--query_max_len must be at least 1"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"query_instruction_format": "{}"}, "expected two {}"),
        ({"input_file": "nowhere.jsonl"}, "--input_file: nowhere.jsonl"),
        ({"corpus_data": "nowhere.jsonl"}, "--corpus_data: nowhere.jsonl"),
        ({"model_name_or_path": "./nowhere"}, "--model_name_or_path ./nowhere: no such folder"),
        ({"output_file": "out.parquet"}, "--output_file out.parquet"),
        ({"max_failures": 3}, "--max_failures cannot be used: restarts are for training"),
    ],
)
def test_invalid_flags_are_named(no_ray, data, tiny_model, tmp_path, capfd, changed, message):
    assert main(flags(tiny_model, data, tmp_path, **changed)) == 2
    captured = capfd.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_bad_row_is_named_before_ray_starts(no_ray, data, tiny_model, tmp_path, capfd):
    groups = write(tmp_path / "groups.jsonl", [{"query": "q", "pos": ["p"]}, {"query": "q", "pos": 3}])
    assert main(flags(tiny_model, data, tmp_path, input_file=groups)) == 2
    assert 'groups.jsonl:2: "pos" must be' in capfd.readouterr().err
    pool = write(tmp_path / "pool.jsonl", [{"txt": "q"}])
    assert main(flags(tiny_model, data, tmp_path, corpus_data=pool)) == 2
    assert 'pool.jsonl:1: "text" must be' in capfd.readouterr().err


def test_output_must_not_be_an_input(no_ray, data, tiny_model, tmp_path, capfd):
    groups = write(tmp_path / "groups.jsonl", data[1])
    before = groups.read_bytes()
    for name, read_from in ((groups, groups), (tmp_path / "." / "groups.jsonl", tmp_path)):
        assert main(flags(tiny_model, data, tmp_path, input_file=read_from, output_file=name)) == 2
        assert "is a file that --input_file reads" in capfd.readouterr().err
    assert main(flags(tiny_model, data, tmp_path, output_file=tmp_path)) == 2
    assert "is a folder" in capfd.readouterr().err
    assert groups.read_bytes() == before
