"""FlagEmbedding's flags and the commands of its documents, in all versions: accepted, or refused with a reason.

The lists are those of its argument classes and parsers at https://github.com/FlagOpen/FlagEmbedding, over its history:
`finetune.embedder` (base, M3, decoder-only) and the older `baai_general_embedding.finetune` and `BGE_M3`;
`scripts/hn_mine.py` and its forerunner, `scripts/add_reranker_score.py`; `evaluation` (beir, msmarco, mteb, custom and
others) and the older `eval_msmarco`; `retromae_pretrain`.
"""

import gzip
import json
import shlex
from pathlib import Path

import pytest
from tiny import make_tiny

from raybge.cli.options import EncodeOptions, EvaluateOptions, MineOptions, PretrainOptions, TrainOptions, TuneOptions
from raybge.cli.options.common import FLAGEMBEDDING
from raybge.cli.parser import build_options, declared_flags, parse_options
from raybge.evaluation.spec import EvaluationSpec
from raybge.mining.spec import MiningSpec
from raybge.training.spec import TrainingSpec
from raybge.training.tasks.finetune_spec import FinetuneSpec
from raybge.training.tasks.pretrain_spec import PretrainSpec
from raybge.training.trainer_check import check_trainer
from raybge.util.errors import UserError

LISTS = {
    TrainOptions: """
        additional_special_tokens cache_dir cache_path colbert_dim config_name corpus_path drop_threshold
        enable_sub_batch eval_data example_passage_max_len example_query_max_len fix_encoder fix_position_embedding
        from_peft icl_suffix_str kd_loss_plus_normal_loss kd_loss_type knowledge_distillation learning_rate lora_alpha
        lora_dropout lora_rank max_example_num_per_dataset model_name_or_path modules_to_save mrl_dims
        negatives_cross_device normalize_embeddings normlized num_train_epochs only_merge_lora_model pad_to_multiple_of
        passage_instruction_for_retrieval passage_instruction_format passage_max_len peft_model_path
        query_instruction_for_retrieval query_instruction_format query_max_len raw_peft retrieval_use_examples
        same_dataset_within_batch same_task_within_batch save_merged_lora_model self_distill_start_step
        sentence_pooling_method shuffle_ratio small_threshold sub_batch_size target_modules temperature token
        tokenizer_name train_data train_group_size trust_remote_code unified_finetuning use_fast_tokenizer
        use_flash_attn use_inbatch_neg use_lora use_mrl use_self_distill use_slow_tokenizer
        dataloader_drop_last dataloader_num_workers deepspeed fp16 gradient_accumulation_steps gradient_checkpointing
        logging_steps max_steps output_dir overwrite_output_dir per_device_eval_batch_size per_device_train_batch_size
        save_steps save_total_limit warmup_ratio weight_decay""",
    MineOptions: """
        batch_size cache_dir candidate_pool compress_layers compress_ratio cutoff_layers devices embedder_batch_size
        embedder_model_class embedder_name_or_path embedder_passage_max_length embedder_query_max_length
        encode_batch_size examples_for_task examples_instruction_format input_file model_name_or_path negative_number
        normalize normalize_embeddings output_file passage_instruction_for_rerank passage_instruction_format_for_rerank
        pooling_method prompt query_instruction_for_rerank query_instruction_for_retrieval
        query_instruction_format_for_rerank query_instruction_format_for_retrieval range_for_sampling
        reranker_batch_size reranker_max_length reranker_model_class reranker_name_or_path reranker_peft_path
        reranker_query_max_length search_batch_size similarity_range tei_url thread_num trust_remote_code use_bf16
        use_fp16 use_gpu_for_searching""",
    EvaluateOptions: """
        add_instruction batch_size benchmark_version cache_dir cache_path compress_layers compress_ratio corpus_data
        corpus_embd_save_dir cutoff_layers dataset_dir dataset_names devices domain_for_pseudo_moe domains
        embedder_batch_size embedder_model_class embedder_name_or_path embedder_passage_max_length
        embedder_query_max_length encoder eval_metrics eval_name eval_output_method eval_output_path examples_for_task
        examples_instruction_format examples_path force_redownload fp16 ignore_identical_ids index_factory k k_values
        languages load_embedding max_passage_length max_query_length model_cache_dir normalize normalize_embeddings
        output_dir overwrite passage_instruction_for_rerank passage_instruction_format_for_rerank pooling_method prompt
        query_data query_instruction_for_rerank query_instruction_for_retrieval query_instruction_format_for_rerank
        query_instruction_format_for_retrieval rerank_top_k reranker_batch_size reranker_max_length
        reranker_model_class reranker_name_or_path reranker_peft_path reranker_query_max_length retriever_batch_size
        retriever_passage_max_length retriever_query_max_length save_embedding save_path search_top_k splits task_type
        task_types tasks token truncate_dim trust_remote_code use_bf16 use_fp16 use_special_examples
        use_special_instructions""",
    PretrainOptions: """
        config_name dataloader_drop_last dataloader_num_workers decoder_mlm_probability encoder_mlm_probability
        learning_rate logging_steps max_seq_length model_name_or_path num_train_epochs output_dir
        per_device_train_batch_size tokenizer_name train_data""",
    # Arguments of FlagModel and FlagAutoModel, which raybge.encode has in place of a script.
    EncodeOptions: """
        batch_size cache_dir devices embedder_model_class examples_for_task examples_instruction_format max_length
        model_name_or_path normalize_embeddings pooling_method query_instruction_for_retrieval
        query_instruction_format_for_retrieval trust_remote_code truncate_dim use_bf16 use_fp16""",
}
VALUES = {"bool": True, "int": 7, "float": 0.5, "str": "x", "json": {"a": 1}}


@pytest.mark.parametrize(("options_class", "name"), [(each, name) for each in LISTS for name in LISTS[each].split()])
def test_each_flag_is_accepted_or_refused_with_a_reason(options_class, name):
    flags = {spelling: f for f in declared_flags(options_class).values() for spelling in f.spellings}
    f = flags[name]
    value = (f.default is not True) if f.kind == "bool" else f.choices[0] if f.choices else VALUES[f.kind]
    required = [each for each in flags.values() if each.required and each.name != f.name]
    values = {each.name: each.choices[0] if each.choices else VALUES[each.kind] for each in required}
    lines: list[str] = []
    try:
        options = build_options(options_class, {**values, name: [value] if f.many else value}, lines.append)
    except UserError as error:
        assert f.refused and str(error) == f"--{f.name} cannot be used: {f.refused}"
        return
    if f.no_effect:
        assert lines == [f"--{f.name} has no effect: {f.no_effect}"]
    else:
        assert {**vars(options), **getattr(options, "training", {})}[f.name] == ([value] if f.many else value)
        assert not lines


@pytest.mark.parametrize("options_class", LISTS)
def test_flags_at_flagembeddings_defaults_are_accepted(options_class):
    others = [f for f in declared_flags(options_class).values() if f.group == FLAGEMBEDDING]
    required = [f for f in declared_flags(options_class).values() if f.required]
    values = {f.name: f.choices[0] if f.choices else VALUES[f.kind] for f in required}
    lines: list[str] = []
    options = build_options(options_class, {**values, **{f.name: f.default for f in others}}, lines.append)
    assert not lines and not {f.name for f in others} & set(vars(options)) - {"token"}


@pytest.mark.parametrize("options_class", [*LISTS, TuneOptions])
def test_no_reason_is_empty_and_no_name_is_declared_twice(options_class):
    others = getattr(options_class, "other_flags", ())
    assert len({f.name for f in others}) == len(others)
    assert all(len((f.refused or f.no_effect).split()) >= 2 for f in others)
    own = {spelling for f in declared_flags(options_class).values() if f not in others for spelling in f.spellings}
    assert not own & {f.name for f in others}


# --- commands of the documents ----------------------------------------------------------------------------------------

STANDARD = """--model_name_or_path MODEL --cache_dir ./cache/model --train_data GROUPS GROUPS_2
    --cache_path ./cache/data --train_group_size 8 --query_max_len 512 --passage_max_len 512 --pad_to_multiple_of 8
    --query_instruction_for_retrieval 'Represent this sentence for searching relevant passages: '
    --query_instruction_format '{}{}' --knowledge_distillation False --output_dir ./out --overwrite_output_dir
    --learning_rate 1e-5 --fp16 --num_train_epochs 2 --per_device_train_batch_size 2 --dataloader_drop_last True
    --warmup_ratio 0.1 --gradient_checkpointing --deepspeed DEEPSPEED --logging_steps 1 --save_steps 1000
    --negatives_cross_device --temperature 0.02 --sentence_pooling_method cls --normalize_embeddings True
    --kd_loss_type kl_div"""
SAME_DATASET = "--same_dataset_within_batch True --small_threshold 0 --drop_threshold 0"
FORERUNNER = """--output_dir out --model_name_or_path MODEL --train_data GROUPS --learning_rate 1e-5 --fp16
    --num_train_epochs 5 --per_device_train_batch_size 1 --dataloader_drop_last True --normlized True
    --temperature 0.02 --query_max_len 64 --passage_max_len 256 --train_group_size 2 --negatives_cross_device
    --logging_steps 10 --save_steps 1000 --query_instruction_for_retrieval '' """
PRETRAINING = """--output_dir out --model_name_or_path MODEL --train_data TEXTS --learning_rate 2e-5
    --num_train_epochs 2 --per_device_train_batch_size 1 --dataloader_drop_last True --max_seq_length 512
    --logging_steps 10 --dataloader_num_workers 12"""
MINING = """--input_file GROUPS --output_file mined.jsonl --range_for_sampling 2-200 --negative_number 15
    --embedder_name_or_path MODEL"""
EVALUATION = """--encoder MODEL --fp16 --add_instruction --k 100 --corpus_data CORPUS --query_data QUERIES"""
DOCUMENTED = [
    (TrainOptions, STANDARD),
    (TrainOptions, f"{STANDARD} {SAME_DATASET}"),
    (TrainOptions, FORERUNNER),
    (PretrainOptions, PRETRAINING),
    (PretrainOptions, PRETRAINING.replace("--dataloader_num_workers 12", "")),
    (MineOptions, MINING),
    (MineOptions, MINING.replace("embedder_name_or_path", "model_name_or_path")),
    (MineOptions, f"{MINING} --candidate_pool TEXTS --use_fp16 True --query_instruction_for_retrieval 'Represent: '"),
    (EvaluateOptions, EVALUATION),
    (
        EvaluateOptions,
        """--eval_name mine --corpus_data CORPUS --query_data QUERIES --search_top_k 1000 --cache_path ./cache/data
        --overwrite True --eval_output_method json --eval_output_path ./results.json --embedder_name_or_path MODEL
        --embedder_batch_size 1024 --embedder_query_max_length 16 --embedder_model_class encoder-only-base
        --query_instruction_for_retrieval 'Represent: ' --query_instruction_format_for_retrieval '{}{}'""",
    ),
]
REFUSED_DOCUMENTED = [
    (TrainOptions, f"{STANDARD} --unified_finetuning True --use_self_distill True --fix_encoder False", "M3 family"),
    (TrainOptions, f"{STANDARD} --additional_special_tokens '<instruct>' '<query>'", "resize_token_embeddings"),
    (MineOptions, f"{MINING} --devices cuda:0 cuda:1", "--devices cannot be used: .* use --num_workers N"),
    (MineOptions, f"{MINING} --similarity_range 0.2-0.8", "use --min_score and --max_score"),
    (EvaluateOptions, f"{EVALUATION} --reranker_name_or_path BAAI/bge-reranker-v2-m3", "without a reranker"),
    (EvaluateOptions, f"{EVALUATION} --eval_output_method markdown", "written as JSON"),
    (EvaluateOptions, f"{EVALUATION} --dataset_dir ./beir/data --dataset_names fiqa arguana", "--corpus_data"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """Files and folders by their placeholders in the commands."""
    folder: Path = tmp_path_factory.mktemp("recipe")
    rows = {
        "GROUPS": [{"query": "q", "pos": ["p"], "neg": ["n", "m"]}] * 3,
        "TEXTS": [{"text": "some words"}] * 3,
        "CORPUS": [{"content": "A is ..."}, {"content": "B is ..."}],
        "QUERIES": [{"query": "What is A?", "positive": ["A is ..."]}],
    }
    texts = {name: "".join(json.dumps(row) + "\n" for row in each) for name, each in rows.items()}
    files = {name: folder / f"{name.lower()}.json" for name in texts}
    for name, path in files.items():
        path.write_text(texts[name])
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(texts["GROUPS"].encode()))
    (folder / "ds_stage0.json").write_text('{"zero_optimization": {"stage": 0}, "fp16": {"enabled": "auto"}}')
    more = {"GROUPS_2": folder / "more.jsonl.gz", "DEEPSPEED": folder / "ds_stage0.json"}
    return {name: str(path) for name, path in {**files, **more}.items()} | {"MODEL": make_tiny(folder / "tiny")}


def words(command: str, places: dict[str, str]) -> list[str]:
    return [places.get(word, word) for word in shlex.split(command)]


@pytest.mark.parametrize(("options_class", "command"), DOCUMENTED)
def test_a_documented_command_runs_as_it_is_written(options_class, command, places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = parse_options(options_class, words(command, places), "command")
    if options_class is MineOptions:
        MiningSpec.from_options(options)
    elif options_class is EvaluateOptions:
        EvaluationSpec.from_options(options)
    else:
        spec = TrainingSpec.from_options(options, FinetuneSpec if options_class is TrainOptions else PretrainSpec)
        check_trainer(spec.trainer, joins_cluster=True)  # where DeepSpeed is installed


@pytest.mark.parametrize(("options_class", "command", "reason"), REFUSED_DOCUMENTED)
def test_a_documented_command_is_refused_in_one_line(options_class, command, reason, places):
    with pytest.raises(UserError, match=reason) as error:
        parse_options(options_class, words(command, places), "command")
    assert "\n" not in str(error.value)


def test_scoring_with_a_cross_encoder_requires_its_own_flag(places, tmp_path, monkeypatch):
    """The command of add_reranker_score.py; raybge.mine with a cross-encoder alone could mean either."""
    monkeypatch.chdir(tmp_path)
    command = """--input_file GROUPS --output_file scored.jsonl --reranker_name_or_path BAAI/bge-reranker-v2-m3
        --cache_dir ./cache/model --reranker_query_max_length 512 --reranker_max_length 1024"""
    with pytest.raises(UserError, match="--score_only, which only scores the rows"):
        MiningSpec.from_options(parse_options(MineOptions, words(command, places), ""))
    assert MiningSpec.from_options(parse_options(MineOptions, words(f"{command} --score_only", places), "")).score_only


def test_the_instruction_of_queries_reaches_the_evaluated_model(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = "--encoder MODEL --corpus_data CORPUS --query_data QUERIES"
    more = "--query_instruction_for_retrieval 'Represent: ' --query_instruction_format_for_retrieval '<{}>{}'"
    spec = EvaluationSpec.from_options(parse_options(EvaluateOptions, words(f"{base} {more}", places), ""))
    assert spec.model.encoder.query_instruction_for_retrieval == "Represent: "
    assert spec.model.encoder.query_instruction_format == "<{}>{}"
    for wrong, message in ((f"{more} --add_instruction", "give one"), ("--query_instruction_format x", "two {}|{}{}")):
        with pytest.raises(UserError, match=message):
            EvaluationSpec.from_options(parse_options(EvaluateOptions, words(f"{base} {wrong}", places), ""))
