"""Model cards, read back as the hub and a person would."""

import itertools
import math
import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_eval_result, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from raybge.data.row_sample import RowSample, TextLengths
from raybge.evaluation.metric_changes import MetricChange
from raybge.merging.merged_card import MergedModelCard
from raybge.model.citations import citations_section
from raybge.model.folder import FolderSettings
from raybge.model.origin import ModelOrigin, display_name
from raybge.model.training_card import MAX_ROWS, HeldOutData, TrainingCard

HISTORY = [
    {"step": step, "epoch": step / 50, "loss": 2.5 - step / 100, "learning_rate": 1e-5, "grad_norm": 1.0}
    for step in range(1, 101)
]
EVALUATIONS = [
    {"step": step, "epoch": step / 50, "eval_nDCG@10": 0.5 + step / 1000, "eval_MRR@10": 0.4, "eval_runtime": 9.0}
    for step in (50, 100)
]
SUMMARY = [{"step": 100, "epoch": 2.0, "train_loss": 1.9, "train_runtime": 33.3}]
HUB = ModelOrigin("BAAI/bge-small-en-v1.5", "BAAI/bge-small-en-v1.5", "mit", ("en",))
CARD = TrainingCard(
    HUB,
    data=[("/home/someone/data/med.jsonl", 12_345), ("s3://bucket/more/web.jsonl", 55)],
    flags={
        "learning_rate": 2e-5,
        "query_instruction_for_retrieval": "Find this and/or that:\n| ",
        "train_data": ["/home/someone/data/med.jsonl", "s3://bucket/more/web.jsonl"],
        "output_dir": "../someone/out",
        "model_name_or_path": "BAAI/bge-small-en-v1.5",
        "tokenizer_name": "/home/someone/words",
        "token": "hf_SECRET",
        "hub_token": "hf_SECRET",
        "deepspeed": {"path": "/home/someone/nvme", "stage": 3, "api_key": "hf_SECRET"},
        "use_lora": True,
        "mrl_dims": None,
    },
    history=HISTORY + EVALUATIONS + SUMMARY,
    metrics=[
        MetricChange("nDCG@10", 0.61, 0.6789, 0.05, 0.09, 400),
        MetricChange("MRR@10", 0.5, 0.55, -0.01, 0.11, 400),
    ],
    license="mit",
    languages=("en",),
    held_out=HeldOutData("dev.jsonl", 400, 3000),
    versions={"torch": "2.13.0", "raybge": "0.1.0"},
)


def tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of each section's table below its head."""
    result = {}
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines() if line.startswith("|")]
        result[title] = [[cell.strip() for cell in row] for row in rows[2:]]
    return result


def front_matter(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_card_contains_its_fields(tmp_path):
    CARD.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text == CARD.text()
    metadata = front_matter(text)
    assert metadata["base_model"] == "BAAI/bge-small-en-v1.5"
    assert metadata["library_name"] == "sentence-transformers" and metadata["pipeline_tag"] == "sentence-similarity"
    assert {"sentence-transformers", "feature-extraction"} <= set(metadata["tags"])
    sections = tables(text)
    assert sections["Training data"] == [["`med.jsonl`", "12,345"], ["`web.jsonl`", "55"], ["all", "12,400"]]
    assert sections["Results"] == [
        ["nDCG@10", "0.6100", "0.6789", "+0.0689", "+0.0500 to +0.0900", "better"],
        ["MRR@10", "0.5000", "0.5500", "+0.0500", "-0.0100 to +0.1100", "not significant"],
    ]
    assert "400 held-out queries of dev.jsonl, searched in 3,000 passages." in text
    assert sections["Evaluation while training"] == [["50", "1", "0.55", "0.4"], ["100", "2", "0.6", "0.4"]]
    flags = dict(sections["Flags"])
    assert flags["`learning_rate`"] == "`2e-05`"
    assert flags["`train_data`"] == '`["med.jsonl", "web.jsonl"]`'
    assert flags["`query_instruction_for_retrieval`"] == '`"Find this and/or that:\\n\\| "`'
    assert flags["`model_name_or_path`"] == '`"BAAI/bge-small-en-v1.5"`'
    assert "- torch 2.13.0" in text and "- raybge 0.1.0" in text


def test_loss_table_is_evenly_spaced_and_complete():
    rows = tables(CARD.text())["Loss while training"]
    assert len(rows) == MAX_ROWS == 20
    steps = [int(row[0]) for row in rows]
    assert (steps[0], steps[-1]) == (1, 100) and steps == sorted(set(steps))
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 6
    assert {row[0]: row[2] for row in rows} == {str(step): f"{2.5 - step / 100:.4g}" for step in steps}
    few = replace(CARD, history=HISTORY[:3])
    assert [row[0] for row in tables(few.text())["Loss while training"]] == ["1", "2", "3"]


def test_no_secrets_and_no_local_paths():
    text = CARD.text()
    for word in ("SECRET", "someone", "/home", "bucket", "token`", "api_key"):
        assert word not in text


def test_local_base_model_is_not_a_hub_name():
    card = replace(CARD, base=ModelOrigin("mine"), flags={"model_name_or_path": "/home/someone/models/mine"})
    text = card.text()
    assert "base_model" not in front_matter(text)
    assert "`mine`" in text and "someone" not in text and "huggingface.co" not in text


def test_missing_measurements_are_omitted():
    text = TrainingCard(ModelOrigin("base")).text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["How to use it"]
    half = replace(CARD, metrics=[MetricChange("nDCG@10", None, 0.6789)])
    assert tables(half.text())["Results"] == [["nDCG@10", "–", "0.6789", "–", "–", ""]]
    assert "Evaluation while training" not in tables(replace(CARD, history=HISTORY).text())


# --- the hub's own reading --------------------------------------------------------------------------------------------


def test_the_hub_reads_the_metadata_and_the_model_index():
    """As huggingface_hub parses a card: valid metadata, and an evaluation result for each metric."""
    card = ModelCard(CARD.text(), ignore_metadata_errors=False)
    data = card.data
    assert (data.license, data.language, data.base_model) == ("mit", "en", "BAAI/bge-small-en-v1.5")
    assert data.to_dict()["base_model_relation"] == "finetune"
    name, results = model_index_to_eval_results(data.to_dict()["model-index"])
    assert name == data.model_name == "bge-small-en-v1.5, fine-tuned"
    assert [(each.metric_type, each.metric_value) for each in results] == [("nDCG@10", 0.6789), ("MRR@10", 0.55)]
    assert {(each.task_type, each.dataset_name) for each in results} == {("information-retrieval", "dev.jsonl")}
    assert results[0].dataset_args == {"queries": 400, "passages": 3000}
    assert results[0].metric_args["difference_95_percent_interval"] == [0.05, 0.09]
    assert results[0].metric_args["difference"] == pytest.approx(0.0689)
    assert str(ModelCard(str(card))) == str(card)  # a second reading changes nothing


def test_the_hub_combines_the_results_with_others(tmp_path):
    """`metadata_update`'s rule: one result for each task, data set and metric."""
    CARD.write(tmp_path)
    metadata = metadata_load(tmp_path / "README.md")
    more = metadata_eval_result(
        model_pretty_name="m", task_pretty_name="Information Retrieval", task_id="information-retrieval",
        metrics_pretty_name="nDCG@10", metrics_id="nDCG@10", metrics_value=0.7, dataset_pretty_name="FiQA",
        dataset_id="fiqa",
    )  # fmt: skip
    assert [*metadata["model-index"][0]] == [*more["model-index"][0]]
    for result in metadata["model-index"][0]["results"]:
        assert {"type", "name"} == {*result["task"]} and {"type", "name"} <= {*result["dataset"]}
        assert all({"type", "value", "name"} <= {*metric} for metric in result["metrics"])


def test_values_that_are_not_numbers_are_no_results():
    nan = math.nan
    card = replace(CARD, metrics=[MetricChange("a@1", 0.5, nan), MetricChange("b@1", nan, 0.5, nan, nan, 3)])
    _, [result] = model_index_to_eval_results(front_matter(card.text())["model-index"])
    assert (result.metric_type, result.metric_value, result.metric_args) == ("b@1", 0.5, None)


def test_several_languages_and_adapters():
    settings = FolderSettings(base="BAAI/bge-small-en-v1.5")
    metadata = front_matter(replace(CARD, languages=("en", "de"), settings=settings).text())
    assert metadata["language"] == ["en", "de"] and metadata["base_model_relation"] == "adapter"


# --- model, data, training, citation ----------------------------------------------------------------------------------


def test_the_model_section_has_the_trained_lengths():
    settings = FolderSettings("mean", True, {"query": "find | this: "}, max_length=512)
    text = replace(CARD, settings=settings, width=384, lengths={"queries": 64, "passages": 256}).text()
    rows = dict(tables(text)["Model"])
    assert rows["vector"] == "384 dimensions, normalized to length 1, similarity: cosine"
    assert rows["maximum length"] == "512 tokens"
    assert rows["trained lengths"] == "queries up to 64 tokens, passages up to 256 tokens"
    assert rows["prompt «query»"] == r"find \| this:" and rows["license"] == "mit" and rows["languages"] == "en"
    missing = dict(tables(replace(CARD, settings=settings, license=None, languages=()).text())["Model"])
    assert "not stated" in missing["license"] and "not stated" in missing["languages"]


def test_the_data_section_has_lengths_and_examples():
    lengths = [TextLengths("query", 1000, 3, 7.25, 19), TextLengths("positive", 1500, 10, 80.0, 400)]
    examples = [{"query": "a | b\n<script>", "positive": "c " * 400}]
    text = replace(CARD, sample=RowSample(1000, lengths, examples)).text()
    section = text[text.index("## Training data") : text.index("## Loss")]
    assert "| query | 1,000 | 3 | 7.2 | 19 |" in section and "| positive | 1,500 | 10 | 80.0 | 400 |" in section
    assert "sample of 1,000 rows" in section and r"| a \| b \<script\> | c c c" in section and "c…" in section
    assert "<script>" not in text


def test_the_training_section_has_all_hyperparameters():
    values = {"temperature": 0.02, "optim": "adamw", "token": "hf_SECRET", "mrl_dims": None}
    text = replace(CARD, hyperparameters=values, training=[("hardware", "2 × GPU"), ("time", "3 min")]).text()
    assert tables(text)["Training"][:2] == [["hardware", "2 × GPU"], ["time", "3 min"]]
    assert "| `temperature` | `0.02` |" in text and '| `optim` | `"adamw"` |' in text
    assert "SECRET" not in text and "mrl_dims" not in text


def test_citations_follow_from_the_methods():
    plain = citations_section("train", {"use_mrl": False, "sub_batch_size": None})
    assert "C-Pack" in plain and "Matryoshka" not in plain and "Scaling Deep" not in plain
    more = citations_section("train", {"use_mrl": True, "sub_batch_size": 32, "use_lora": True})
    assert more.count("@misc{") == plain.count("@misc{") + 3 and "2205.13147" in more and "2106.09685" in more
    assert "2205.12035" in citations_section("pretrain", {"pretrain_method": "retromae"})
    assert more.count("{") == more.count("}")


@pytest.mark.parametrize(
    "path, name",
    [
        ("BAAI/bge-m3", "BAAI/bge-m3"),
        ("gpt2", "gpt2"),
        ("/a/b/c", "c"),
        ("../x/y", "y"),
        ("./y", "y"),
        ("a/b/c/", "c"),
        ("s3://b/k/file", "file"),
        ("C:\\a\\b", "b"),
        ("~/m/n", "n"),
    ],
)
def test_display_name(path, name):
    assert display_name(path) == name


def test_the_snippets_run(tmp_path, tiny):
    """Both snippets, with the folder replaced, give the same score, with the folder's prompts."""
    from raybge.model.encoder import Encoder

    folder = str(tmp_path / "model")
    Encoder(tiny(), query_instruction_for_retrieval="what is ", devices="cpu").save(folder)
    scores = []
    for code in re.findall(r"```python\n(.*?)```", CARD.text(), re.DOTALL):
        names: dict = {}
        exec(code.replace("path/of/this/folder", folder), names)
        scores.append(float(names["scores"][0][0]))
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and abs(scores[0]) > 0.01


# --- merged models ---------------------------------------------------------------------------------------------------

MERGED = MergedModelCard(
    "encoder",
    [("/home/someone/runs/mine", 0.25), ("BAAI/bge-small-en-v1.5", 0.75)],
    flags={"model_names_or_paths": ["/home/someone/runs/mine", "BAAI/bge-small-en-v1.5"], "output_path": "/home/x/out"},
    versions={"torch": "2.13.0"},
)


def test_merge_card_names_models_and_weights():
    text = MERGED.text()
    assert front_matter(text)["base_model"] == ["BAAI/bge-small-en-v1.5"]
    assert front_matter(text)["library_name"] == "sentence-transformers" and "merge" in front_matter(text)["tags"]
    sections = tables(text)
    assert sections["Weights"] == [["`mine`", "0.25"], ["`BAAI/bge-small-en-v1.5`", "0.75"]]
    assert dict(sections["Flags"])["`model_names_or_paths`"] == '`["mine", "BAAI/bge-small-en-v1.5"]`'
    assert (
        "the weighted sum" in text and "SentenceTransformer(" in text and "someone" not in text and "/home" not in text
    )


def test_merge_card_states_the_origin_of_weights():
    scored = replace(MERGED, losses=[0.5, 1.25]).text()
    assert tables(scored)["Weights"] == [["`mine`", "0.25", "0.5"], ["`BAAI/bge-small-en-v1.5`", "0.75", "1.25"]]
    assert "softmax(-loss / temperature)" in scored
    searched = replace(
        MERGED, metric="nDCG@10", search_results={"target": 0.7, "general": 0.6, "evaluations": 14}
    ).text()
    assert "evaluated 14 candidates: nDCG@10 0.7 on the target set and 0.6 on the general set." in searched


@pytest.mark.parametrize(("model_type", "library"), [("decoder", "transformers"), ("reranker", "transformers")])
def test_merge_card_of_other_model_types(model_type, library):
    text = replace(MERGED, model_type=model_type).text()
    assert front_matter(text)["library_name"] == library and "SentenceTransformer" not in text
