"""Advice on unknown flags: for typing errors, and never a flag that does something else."""

import pytest

from raybge.cli.options import EvaluateOptions, MineOptions, TrainOptions, TuneOptions
from raybge.cli.parser import build_options, closest_flag, declared_flags
from raybge.util.errors import UserError

TYPING_ERRORS = {
    TrainOptions: {
        "trian_data": "train_data",
        "train_dta": "train_data",
        "learning_rat": "learning_rate",
        "lerning_rate": "learning_rate",
        "temprature": "temperature",
        "tempertaure": "temperature",
        "normalise_embeddings": "normalize_embeddings",
        "normalize_embedings": "normalize_embeddings",
        "normalized": "normlized",  # FlagEmbedding's own spelling
        "model_name_or_paht": "model_name_or_path",
        "model-name-or-path": "model_name_or_path",
        "outputdir": "output_dir",
        "Output_Dir": "output_dir",
        "negative_cross_device": "negatives_cross_device",
        "use_in_batch_neg": "use_inbatch_neg",
        "num_workes": "num_workers",
        "per_device_train_batchsize": "per_device_train_batch_size",
        "gradient_checkpoiting": "gradient_checkpointing",
        "lr_sheduler_type": "lr_scheduler_type",
        "max_step": "max_steps",
    },
    MineOptions: {"negativ_number": "negative_number", "range_for_samplin": "range_for_sampling"},
    EvaluateOptions: {"corpsu_data": "corpus_data", "qrel": "qrels"},
    TuneOptions: {"num_sampels": "num_samples", "metrics": "metric"},
}
OTHER_MEANINGS = {
    TrainOptions: (
        *("cache_paths_dir", "cache_file", "data_dir", "data_path", "output_path", "output_file", "model_dir"),
        *("eval_batch_size", "eval_epochs", "bf32", "fp32", "tf16", "adam_beta3", "query_min_len", "warmup_epochs"),
        *("passage_max_tokens", "save_total_steps", "lora_bias", "early_stopping", "batch", "x", ""),
        *("unified_finetunning", "num_gpus", "num_nodes", "use_tpu", "max_epochs", "log_steps", "eval_score"),
    ),
    MineOptions: ("use_cpu", "output_dir", "train_data", "positive_number", "mean_score", "negative_words"),
    EvaluateOptions: ("cache_pth_dir", "query_file", "corpus_file", "load_query", "save_file", "fp8", "run_name"),
    TuneOptions: ("num_trials", "models", "search_data", "num_threads"),
}


def pairs(table):
    return [(options_class, name) for options_class, names in table.items() for name in names]


@pytest.mark.parametrize(("options_class", "name"), pairs(TYPING_ERRORS))
def test_a_typing_error_is_corrected(options_class, name):
    expected = TYPING_ERRORS[options_class][name]
    with pytest.raises(UserError, match=rf"there is no flag --{name}; did you mean --{expected}\?"):
        build_options(options_class, {name: "1"})


@pytest.mark.parametrize(("options_class", "name"), pairs(OTHER_MEANINGS))
def test_a_flag_of_another_meaning_is_not_suggested(options_class, name):
    with pytest.raises(UserError) as error:
        build_options(options_class, {name: "1"})
    assert str(error.value) == f"there is no flag --{name}; --help lists them"


def test_flags_that_cannot_be_used_are_not_suggested():
    for f in declared_flags(EvaluateOptions).values():
        if f.refused or f.no_effect:
            assert closest_flag(f"{f.name}{f.name[-1]}", {f.name: f}) is None
