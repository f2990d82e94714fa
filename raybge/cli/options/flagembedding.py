"""Flags of FlagEmbedding's scripts that raybge's commands have no use for, each with the reason.

Its other flags are declared with those of the commands, under the same names or as aliases. These are not listed by
`--help`, and no spec reads them. A flag at FlagEmbedding's default is accepted, so that a command that repeats it runs.
"""

from __future__ import annotations

from typing import Any

from raybge.cli.flag import Flag
from raybge.cli.options.common import FLAGEMBEDDING

_DENSE = "raybge trains and uses the dense vector; the M3 family's sparse and multi-vector outputs are not supported"
_IN_CONTEXT = "in-context examples, as of bge-en-icl, are not supported"
_NO_RERANKING = "raybge.evaluate measures the embedding model alone, without a reranker"
_LAYERWISE = "layerwise and lightweight rerankers are not supported"
_RERANK_PROMPT = "a cross-encoder gets the query and the passage as they are; write the instruction into the rows"
_OWN_DATA = "raybge downloads no BEIR, MSMARCO or MIRACL"
_BENCHMARK = "AIR-Bench and BRIGHT are not supported"


def _refused(name: str, default: Any, reason: str) -> Flag:
    kind = type(default).__name__ if isinstance(default, bool | int) else "str"
    many = default is None or isinstance(default, list)
    return Flag(name, kind, many, default, FLAGEMBEDDING, "a flag of FlagEmbedding", refused=reason)


def _unused(name: str, default: Any, reason: str) -> Flag:
    kind = type(default).__name__ if isinstance(default, bool | int) else "str"
    return Flag(name, kind, False, default, FLAGEMBEDDING, "a flag of FlagEmbedding", no_effect=reason)


# Of finetune.embedder, all families, and of the older baai_general_embedding.finetune and BGE_M3.
TRAINING = (
    _refused("unified_finetuning", False, _DENSE),
    _refused("use_self_distill", False, f"it distills the outputs of M3 into each other; {_DENSE}"),
    _refused("self_distill_start_step", -1, f"it belongs to --use_self_distill; {_DENSE}"),
    _refused("fix_encoder", False, f"it trains the other outputs of M3 alone; {_DENSE}"),
    _refused("colbert_dim", -1, f"it is the width of M3's multi-vector output; {_DENSE}"),
    _refused("enable_sub_batch", True, "use --sub_batch_size -1, which computes each batch at once"),
    _refused("kd_loss_plus_normal_loss", True, "kl_div is added to the contrastive loss, m3_kd_loss replaces it"),
    _refused(
        "additional_special_tokens",
        None,
        "the tokenizer is used as it is; add the tokens to the model's folder with transformers (add_special_tokens, "
        "resize_token_embeddings) and start from that",
    ),
    _refused("peft_model_path", "", "to train adapters further, name their folder as --model_name_or_path"),
    _refused("from_peft", None, "to train adapters further, name their folder as --model_name_or_path"),
    _refused("raw_peft", None, "merge these adapters into the model with peft, and start from the merged model"),
    _refused("modules_to_save", None, "adapters are trained alone; without --use_lora all weights are"),
    _refused("only_merge_lora_model", False, "train with --save_merged_lora_model, which writes the merged model"),
    _unused("use_flash_attn", False, "the fastest attention that the device has is used in any case"),
    _refused("use_slow_tokenizer", False, "use --use_fast_tokenizer False"),
    _refused("example_query_max_len", 64, _IN_CONTEXT),
    _refused("example_passage_max_len", 96, _IN_CONTEXT),
    _refused("retrieval_use_examples", True, _IN_CONTEXT),
    _refused("icl_suffix_str", "\nResponse:", _IN_CONTEXT),
)

# Of each script that loads an embedding model.
EMBEDDER = (
    _unused("embedder_model_class", None, "the architecture and the pooling are read from the model's folder"),
    _refused(
        "devices",
        None,
        "Ray assigns the devices: use --num_workers N with --use_gpu True or False; CUDA_VISIBLE_DEVICES selects GPUs",
    ),
    _refused("examples_for_task", None, _IN_CONTEXT),
    _refused("examples_instruction_format", "{}{}", _IN_CONTEXT),
)

# Of scripts/hn_mine.py, its forerunner baai_general_embedding.finetune.hn_mine, and scripts/add_reranker_score.py.
MINING = (
    *EMBEDDER,
    _refused("similarity_range", "0.0-1.0", "use --min_score and --max_score"),
    _refused("tei_url", None, "raybge encodes with its own workers, not with a server: use --model_name_or_path"),
    _refused("thread_num", 8, "it belongs to --tei_url; --num_workers and --cpus_per_worker set the parallelism"),
    _unused("reranker_model_class", None, "the architecture is read from the model's folder"),
    _refused("reranker_peft_path", None, "merge the adapters into the reranker with peft, and name the merged model"),
    _refused("query_instruction_for_rerank", None, _RERANK_PROMPT),
    _refused("query_instruction_format_for_rerank", "{}{}", _RERANK_PROMPT),
    _refused("passage_instruction_for_rerank", None, _RERANK_PROMPT),
    _refused("passage_instruction_format_for_rerank", "{}{}", _RERANK_PROMPT),
    _refused("prompt", None, "prompts belong to decoder-only rerankers, which are not supported"),
    _refused("cutoff_layers", None, _LAYERWISE),
    _refused("compress_layers", None, _LAYERWISE),
    _refused("compress_ratio", 1, _LAYERWISE),
)

# Of FlagEmbedding.evaluation: beir, msmarco, mteb, custom and the benchmarks of languages.
EVALUATION = (
    *EMBEDDER,
    _unused("eval_name", None, "--metrics_file and --run_file name the results"),
    _unused("overwrite", False, "metrics are always computed anew, and replace those of the same file"),
    _unused("cache_path", None, "rows are read where they are; the datasets of MTEB tasks are stored under HF_HOME"),
    _refused(
        "dataset_dir", None, "use --corpus_data, --query_data and --qrels; a BEIR folder is given as the first two"
    ),
    _refused("dataset_names", None, f"{_OWN_DATA}: name one folder of data as --corpus_data and --query_data"),
    _refused("splits", ["test"], "name the file of the split's judgments as --qrels"),
    _refused("force_redownload", False, _OWN_DATA),
    _refused("token", None, "set HF_TOKEN in the environment of all nodes"),
    _refused("corpus_embd_save_dir", None, "use --save_embedding with --save_path FILE, then --load_embedding"),
    _refused("output_dir", None, "use --run_file FILE, which gets the retrieved passages in TREC's format"),
    _refused("k_values", None, "metrics are written at 1, 10 and 100, as far as --k reaches"),
    _refused("eval_metrics", None, "all metrics are written: nDCG, MRR, Recall, MAP, Precision, HitRate"),
    _refused("eval_output_method", "json", "metrics are written as JSON (--metrics_file) and in an HTML report"),
    _refused("use_special_instructions", False, "use --query_instruction_for_retrieval"),
    _refused("languages", None, "name the tasks: --mteb_tasks; a task is evaluated in all its languages"),
    _refused("task_types", None, "name the tasks: --mteb_tasks"),
    _refused("task_type", None, _BENCHMARK),
    _refused("benchmark_version", None, _BENCHMARK),
    _refused("domains", None, _BENCHMARK),
    _refused("model_cache_dir", None, "use --cache_dir"),
    _refused("examples_path", None, _IN_CONTEXT),
    _refused("use_special_examples", False, _IN_CONTEXT),
    _refused("domain_for_pseudo_moe", None, "models with one set of weights per domain are not supported"),
    _refused("truncate_dim", None, "raybge.encode has --truncate_dim; here vectors have their full width"),
    _refused("rerank_top_k", None, f"{_NO_RERANKING}: nothing is reranked"),
    _refused("reranker_name_or_path", None, f"{_NO_RERANKING}; raybge.mine uses one (--cross_encoder)"),
    _refused("reranker_model_class", None, _NO_RERANKING),
    _refused("reranker_peft_path", None, _NO_RERANKING),
    _refused("reranker_batch_size", None, _NO_RERANKING),
    _refused("reranker_max_length", None, _NO_RERANKING),
    _refused("reranker_query_max_length", None, _NO_RERANKING),
    _refused("query_instruction_for_rerank", None, _NO_RERANKING),
    _refused("query_instruction_format_for_rerank", "{}{}", _NO_RERANKING),
    _refused("passage_instruction_for_rerank", None, _NO_RERANKING),
    _refused("passage_instruction_format_for_rerank", "{}{}", _NO_RERANKING),
    _refused("normalize", False, f"{_NO_RERANKING}; --normalize_embeddings scales the embeddings"),
    _refused("prompt", None, _NO_RERANKING),
    _refused("cutoff_layers", None, _NO_RERANKING),
    _refused("compress_layers", None, _NO_RERANKING),
    _refused("compress_ratio", 1, _NO_RERANKING),
)
