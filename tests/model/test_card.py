"""Model cards, read back as the hub and a person would."""

import itertools
import re
from dataclasses import replace

import pytest
import yaml

from raybge.merging.merged_card import MergedModelCard
from raybge.model.card import MAX_ROWS, TrainingCard, display_name

HISTORY = [
    {"step": step, "epoch": step / 50, "loss": 2.5 - step / 100, "learning_rate": 1e-5, "grad_norm": 1.0}
    for step in range(1, 101)
]
EVALUATIONS = [
    {"step": step, "epoch": step / 50, "eval_nDCG@10": 0.5 + step / 1000, "eval_MRR@10": 0.4, "eval_runtime": 9.0}
    for step in (50, 100)
]
SUMMARY = [{"step": 100, "epoch": 2.0, "train_loss": 1.9, "train_runtime": 33.3}]
CARD = TrainingCard(
    base_model="BAAI/bge-small-en-v1.5",
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
    before={"nDCG@10": 0.61, "MRR@10": 0.5},
    after={"nDCG@10": 0.6789, "MRR@10": 0.55},
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
    assert sections["Results"] == [["nDCG@10", "0.61", "0.6789"], ["MRR@10", "0.5", "0.55"]]
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
    card = replace(
        CARD, base_model="/home/someone/models/mine", flags={"model_name_or_path": "/home/someone/models/mine"}
    )
    text = card.text()
    assert "base_model" not in front_matter(text)
    assert "`mine`" in text and "someone" not in text and "huggingface.co" not in text


def test_missing_measurements_are_omitted():
    bare = TrainingCard("/m/base", [], {}, [], None, None, {})
    text = bare.text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["How to use it"]
    half = replace(CARD, before=None)
    assert tables(half.text())["Results"] == [["nDCG@10", "", "0.6789"], ["MRR@10", "", "0.55"]]
    assert "Evaluation while training" not in tables(replace(CARD, history=HISTORY).text())


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
