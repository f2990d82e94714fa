"""MTEB tasks evaluated with raybge's encoder, compared with sentence-transformers."""

import json

import mteb
import numpy as np
import pytest

from raybge import Encoder, evaluate_retrieval
from raybge.evaluate import main

TASKS = ("TinyRetrieval", "TinySTS")


@pytest.fixture(scope="module")
def model(tmp_path_factory, words):
    """Model with prompts for queries and passages, but none for other texts."""
    from tiny import make_tiny

    from raybge.model.folder import FolderSettings, write_settings

    folder = tmp_path_factory.mktemp("model")
    make_tiny(folder, pooler=False, words=words, vocab_size=4 + len(words))
    prompts = {"query": f"{words[0]} {words[1]} ", "document": f"{words[2]} "}
    write_settings(folder, FolderSettings(pooling="mean", normalize=True, max_length=16, prompts=prompts), 16, {})
    return str(folder)


@pytest.fixture(scope="module")
def tasks(words):
    """A retrieval and a similarity task of random words, by name."""
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    rng = np.random.default_rng(3)
    corpus, pairs = ([" ".join(rng.choice(words, 6)) for _ in range(size)] for size in (1500, 80))
    # queries share words with their answers, so that a random model retrieves some of them
    queries = [" ".join([*text.split()[:5], str(rng.choice(words))]) for text in corpus[:40]]

    def task_metadata(name, kind, score):
        empty = dict.fromkeys(("date", "domains", "task_subtypes", "license", "annotations_creators", "dialect"))
        empty |= dict.fromkeys(("sample_creation", "bibtex_citation", "category"))
        where = {"path": "none", "revision": "1"}
        languages = {"eval_splits": ["test"], "eval_langs": ["eng-Latn"], "modalities": ["text"]}
        text = {"description": "Words drawn at random.", "reference": None, "dataset": where}
        return TaskMetadata(type=kind, name=name, main_score=score, **text, **languages, **empty)

    class TinyRetrieval(AbsTaskRetrieval):
        metadata = task_metadata("TinyRetrieval", "Retrieval", "ndcg_at_10")

        def load_data(self, **_):
            judged = {f"q{i}": {f"d{i}": 1, f"d{i + 40}": 2} for i in range(40)}
            split = {
                "corpus": datasets.Dataset.from_list([{"id": f"d{i}", "text": t} for i, t in enumerate(corpus)]),
                "queries": datasets.Dataset.from_list(
                    [{"id": f"q{i}", "text": text} for i, text in enumerate(queries)]
                ),
                "relevant_docs": judged,
                "top_ranked": None,
            }
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    class TinySTS(AbsTaskSTS):
        metadata = task_metadata("TinySTS", "STS", "cosine_spearman")
        min_score, max_score = 0, 1

        def load_data(self, **_):
            columns = {"sentence1": pairs[::2], "sentence2": pairs[1::2], "score": rng.random(40).tolist()}
            split = datasets.Dataset.from_dict(columns)
            self.dataset, self.data_loaded = datasets.DatasetDict({"test": split}), True

    tasks = {"TinyRetrieval": TinyRetrieval(), "TinySTS": TinySTS()}
    for task in tasks.values():
        task.load_data()
    return tasks


@pytest.fixture(scope="module")
def expected(model, tasks):
    """Main scores with sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    results = mteb.evaluate(SentenceTransformer(model, device="cpu"), [*tasks.values()], cache=None, co2_tracker=False)
    return {result.task_name: result.get_score() for result in results.task_results}


def test_mteb_evaluates_the_encoder(model, tasks, expected):
    from raybge.evaluation.mteb import MtebEncoder

    encoder = MtebEncoder(Encoder(model, devices="cpu"))
    results = mteb.evaluate(encoder, [*tasks.values()], cache=None, co2_tracker=False)
    assert {result.task_name: result.get_score() for result in results.task_results} == pytest.approx(
        expected, abs=1e-5
    )
    assert 0.01 < expected["TinyRetrieval"] < 0.95


def test_command_evaluates_tasks_by_name(ray_cluster, model, tasks, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mteb, "get_task", tasks.__getitem__)
    monkeypatch.setattr(tasks["TinyRetrieval"], "ignore_identical_ids", True)
    flags = {"encoder": model, "mteb_tasks": [*TASKS], "storage_path": tmp_path, "num_workers": "2"}
    metrics = evaluate_retrieval(metrics_file=tmp_path / "metrics.json", **flags).metrics
    scores = {"TinyRetrieval/ndcg_at_10": expected["TinyRetrieval"], "TinySTS/cosine_spearman": expected["TinySTS"]}
    assert metrics == pytest.approx(scores, abs=1e-5)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: written[name] for name in scores} == metrics
    assert [task["task_name"] for task in written["tasks"]] == [*TASKS]
    assert written["ignore_identical_ids"] == {"TinyRetrieval": True}
    output = capsys.readouterr().out
    assert "ndcg_at_10" in output
    assert "hits that are the query itself are dropped (ignore_identical_ids): TinyRetrieval\n" in output
    page = (tmp_path / "metrics.json.report.html").read_text()
    assert f"{expected['TinyRetrieval']:.4f}" in page and "TinySTS, test" in page
    # results of the same model are read from the cache
    monkeypatch.setattr("raybge.evaluation.mteb.ActorEncoder.encode_corpus", None)
    assert evaluate_retrieval(**flags).metrics == pytest.approx(metrics, abs=1e-5)  # the cache keeps six digits
    with pytest.raises(TypeError):
        evaluate_retrieval(**{**flags, "query_max_len": 4})


def test_invalid_tasks_are_reported(ray_cluster, model, tasks, monkeypatch, capsys):
    assert main(["--encoder", model, "--mteb_tasks", "NFCorpos"]) == 2
    assert "'NFCorpos' not found. Did you mean: 'NFCorpus'?" in capsys.readouterr().err
    assert main(["--encoder", model, "--mteb_tasks", "NFCorpus", "--compare", model, "--k", "5"]) == 2
    assert "omit --compare" in capsys.readouterr().err
    assert main(["--encoder", model, "--mteb_tasks", "NFCorpus", "--drop_self_hits", "False"]) == 2
    assert "--drop_self_hits: each of the --mteb_tasks has a setting of its own" in capsys.readouterr().err
    assert main(["--encoder", model, "--corpus_data", "corpus.jsonl"]) == 2
    assert "missing: --query_data (or --mteb_tasks)" in capsys.readouterr().err
    monkeypatch.setattr(mteb, "get_task", tasks.__getitem__)

    def unavailable(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(mteb, "evaluate", unavailable)
    assert main(["--encoder", model, "--mteb_tasks", "TinySTS"]) == 2
    assert "the data of TinySTS cannot be read: no route to the hub" in capsys.readouterr().err


def test_missing_package_is_reported(model, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "mteb", None)
    assert main(["--encoder", model, "--mteb_tasks", "NFCorpus"]) == 2
    assert "pip install 'raybge[mteb]'" in capsys.readouterr().err
