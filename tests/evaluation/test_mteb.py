"""Tasks of MTEB, measured with raybge's encoder and with sentence-transformers'."""

import json

import numpy as np
import pytest

from raybge import Encoder, evaluate_retrieval
from raybge.evaluate import main

mteb = pytest.importorskip("mteb")

TASKS = ("TinyRetrieval", "TinySTS")


@pytest.fixture(scope="module")
def model(tmp_path_factory, words):
    """Queries and passages have prompts, and a text alone has none."""
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
    # queries share words with their answers, so that a random model finds some of them
    queries = [" ".join([*text.split()[:5], str(rng.choice(words))]) for text in corpus[:40]]

    def about_task(name, kind, score):
        about = dict.fromkeys(("date", "domains", "task_subtypes", "license", "annotations_creators", "dialect"))
        about |= dict.fromkeys(("sample_creation", "bibtex_citation", "category"))
        where = {"path": "none", "revision": "1"}
        languages = {"eval_splits": ["test"], "eval_langs": ["eng-Latn"], "modalities": ["text"]}
        text = {"description": "Words drawn at random.", "reference": None, "dataset": where}
        return TaskMetadata(type=kind, name=name, main_score=score, **text, **languages, **about)

    class TinyRetrieval(AbsTaskRetrieval):
        metadata = about_task("TinyRetrieval", "Retrieval", "ndcg_at_10")

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
        metadata = about_task("TinySTS", "STS", "cosine_spearman")
        min_score, max_score = 0, 1

        def load_data(self, **_):
            columns = {"sentence1": pairs[::2], "sentence2": pairs[1::2], "score": rng.random(40).tolist()}
            split = datasets.Dataset.from_dict(columns)
            self.dataset, self.data_loaded = datasets.DatasetDict({"test": split}), True

    made = {"TinyRetrieval": TinyRetrieval(), "TinySTS": TinySTS()}
    for task in made.values():
        task.load_data()
    return made


@pytest.fixture(scope="module")
def expected(model, tasks):
    """Main scores with sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    found = mteb.evaluate(SentenceTransformer(model, device="cpu"), [*tasks.values()], cache=None, co2_tracker=False)
    return {result.task_name: result.get_score() for result in found.task_results}


def test_mteb_takes_the_encoder(model, tasks, expected):
    from raybge.evaluation.mteb import MtebEncoder

    encoder = MtebEncoder(Encoder(model, devices="cpu"))
    found = mteb.evaluate(encoder, [*tasks.values()], cache=None, co2_tracker=False)
    assert {result.task_name: result.get_score() for result in found.task_results} == pytest.approx(expected, abs=1e-5)
    assert 0.01 < expected["TinyRetrieval"] < 0.95


@pytest.fixture(scope="module")
def ray_of_two():
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_the_command_measures_tasks_by_name(ray_of_two, model, tasks, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mteb, "get_task", tasks.__getitem__)
    flags = {"encoder": model, "mteb_tasks": [*TASKS], "storage_path": tmp_path, "num_workers": "2"}
    found = evaluate_retrieval(metrics_file=tmp_path / "metrics.json", **flags)
    scores = {"TinyRetrieval/ndcg_at_10": expected["TinyRetrieval"], "TinySTS/cosine_spearman": expected["TinySTS"]}
    assert found == pytest.approx(scores, abs=1e-5)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: written[name] for name in scores} == found
    assert [task["task_name"] for task in written["tasks"]] == [*TASKS]
    assert "ndcg_at_10" in capsys.readouterr().out
    page = (tmp_path / "metrics.json.report.html").read_text()
    assert f"{expected['TinyRetrieval']:.4f}" in page and "TinySTS, test" in page
    # what was measured stays measured, of this model
    monkeypatch.setattr("raybge.evaluation.mteb.Actors.encode_corpus", None)
    assert evaluate_retrieval(**flags) == pytest.approx(found, abs=1e-5)  # it keeps six digits
    with pytest.raises(TypeError):
        evaluate_retrieval(**{**flags, "query_max_len": 4})


def test_what_cannot_be_measured_is_named(ray_of_two, model, tasks, monkeypatch, capsys):
    assert main(["--encoder", model, "--mteb_tasks", "NFCorpos"]) == 2
    assert "'NFCorpos' not found. Did you mean: 'NFCorpus'?" in capsys.readouterr().err
    assert main(["--encoder", model, "--mteb_tasks", "NFCorpus", "--compare", model, "--k", "5"]) == 2
    assert "leave out --compare" in capsys.readouterr().err
    assert main(["--encoder", model, "--corpus_data", "corpus.jsonl"]) == 2
    assert "missing: --query_data (or --mteb_tasks)" in capsys.readouterr().err
    monkeypatch.setattr(mteb, "get_task", tasks.__getitem__)

    def gone(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(mteb, "evaluate", gone)
    assert main(["--encoder", model, "--mteb_tasks", "TinySTS"]) == 2
    assert "the data of TinySTS cannot be read: no route to the hub" in capsys.readouterr().err


def test_without_the_package_it_is_named(model, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "mteb", None)
    assert main(["--encoder", model, "--mteb_tasks", "NFCorpus"]) == 2
    assert "pip install 'raybge[mteb]'" in capsys.readouterr().err
