"""MiningSpec: each option reaches the field of the spec that it determines."""

import json

import pytest

from raybge.cli.options import MineOptions
from raybge.cli.parser import build_options
from raybge.language_model.spec import ChatSpec
from raybge.mining.relabelling import RelabelSpec
from raybge.mining.spec import MiningSpec, parse_rank_range
from raybge.util.errors import UserError


@pytest.fixture
def values(tmp_path, tiny_model):
    path = tmp_path / "groups.jsonl"
    path.write_text(json.dumps({"query": "q", "pos": ["p"]}) + "\n")
    return {"model_name_or_path": tiny_model, "input_file": str(path), "output_file": str(tmp_path / "out.jsonl")}


def spec(values, **changed):
    return MiningSpec.from_options(build_options(MineOptions, {**values, **changed}))


@pytest.mark.parametrize(
    ("flag", "value", "part", "field"),
    [
        ("query_max_len", 7, "model", "query_max_length"),
        ("passage_max_len", 7, "model", "passage_max_length"),
        ("use_fp16", False, "model", "use_fp16"),
        ("use_bf16", True, "model", "use_bf16"),
        ("pooling_method", "mean", "model", "pooling_method"),
        ("passage_instruction_for_retrieval", "a", "model", "passage_instruction_for_retrieval"),
        ("negative_number", 7, "sampling", "number"),
        ("seed", 7, "sampling", "seed"),
        ("sampling_strategy", "top", "sampling", "strategy"),
        ("min_score", 0.5, "sampling", "min_score"),
        ("shard_size", 7, "index", "shard_size"),
        ("shards_per_actor", 7, "index", "shards_per_actor"),
        ("search_batch_size", 7, "index", "search_batch_size"),
        ("index_factory", "HNSW16", "index", "factory"),
        ("overwrite", True, "output", "overwrite"),
        ("num_workers", "3", "scale", "num_workers"),
        ("on_bad_rows", "skip", "inputs", "on_bad_rows"),
    ],
)
def test_each_flag_reaches_its_spec(values, flag, value, part, field):
    assert getattr(getattr(spec(values), part), field) != value
    assert getattr(getattr(spec(values, **{flag: value}), part), field) == value


def test_ranks_and_inputs(values):
    default = spec(values)
    assert (default.sampling.lo, default.sampling.hi) == parse_rank_range("10-210") == (10, 210)
    assert [each.flag for each in default.inputs.inputs] == ["--input_file"] and default.cross_encoder is None
    with_pool = spec(values, corpus_data=values["input_file"])
    assert [each.flag for each in with_pool.inputs.inputs] == ["--input_file", "--corpus_data"]


def test_model_is_not_required_with_an_embedder(values):
    options = build_options(MineOptions, {**values, "model_name_or_path": None})
    assert MiningSpec.from_options(options, has_embedder=True).model is None
    with pytest.raises(UserError, match="missing: --model_name_or_path"):
        MiningSpec.from_options(options)


def test_flags_of_the_judge_reach_its_spec(values):
    assert spec(values).relabel is None and spec(values).judge is None
    judge = {"relabel": "soft", "judge_url": "http://h/v1", "judge_model": "m"}
    assert spec(values, **judge).judge == ChatSpec("http://h/v1", "m", parameters={"temperature": 0})
    more = {"judge_concurrency": 3, "judge_timeout": 5.0, "judge_parameters": {"max_tokens": 9}}
    assert spec(values, **judge, **more).judge == ChatSpec("http://h/v1", "m", 3, 5.0, {"max_tokens": 9})
    assert spec(values, **judge).relabel == RelabelSpec("soft")


def test_a_preset_gives_values_to_unset_flags(values):
    strong = spec(values, preset="strong")
    chosen = strong.sampling
    assert (chosen.strategy, chosen.lo, chosen.hi, chosen.relative_margin) == ("top", 0, 200, 0.05)
    assert strong.keep_scores and chosen.number == spec(values).sampling.number
    assert strong.preset == (
        "preset strong: --sampling_strategy top --range_for_sampling 0-200 --relative_margin 0.05 --keep_scores True"
    )
    assert not spec(values).preset and spec(values).sampling.strategy == "random"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("sampling_strategy", "random"),  # FlagEmbedding's values too
        ("range_for_sampling", "10-210"),
        ("relative_margin", 0.1),
        ("keep_scores", False),
    ],
)
def test_each_flag_of_a_preset_may_be_set(values, flag, value):
    strong, changed = spec(values, preset="strong"), spec(values, preset="strong", **{flag: value})
    assert changed.options == {**strong.options, flag: value}
    old = strong.options[flag]
    assert changed.preset.endswith(f"; --{flag} {value} in place of {old}") and f"--{flag} {old}" not in changed.preset


def test_a_preset_with_score_only_is_refused(values):
    with pytest.raises(UserError, match="--preset chooses negatives, --score_only mines nothing"):
        spec(values, preset="strong", score_only=True, cross_encoder="c")
