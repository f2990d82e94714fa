"""The commands that golden.py runs from both checkouts, with their flags and outputs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from golden_commands import Checkout, Flags
from golden_inputs import WORDS, Inputs
from golden_outputs import (
    Comparison,
    Output,
    read_bytes,
    read_files,
    read_log,
    read_metrics,
    read_vectors,
    read_weights,
)

MULTI_WORKER_LIMIT = 1e-6  # relative difference that runs with several workers may have
STEPS = 20


@dataclass(frozen=True)
class Case:
    """One command whose outputs are compared.

    Args:
        name: of the case, for --only.
        command: for example "train".
        flags: by name; {out} in a text stands for the folder of the run.
        outputs: what is compared.
        limit: largest difference that counts as equal; 0: bit for bit.
        ray_cpus: see Checkout.run.
        altered: flags that must change the outputs, for the self-check.
        interrupted: resume from a checkpoint that the old checkout wrote at this step.
    """

    name: str
    command: str
    flags: Flags
    outputs: tuple[Output, ...]
    limit: float = 0.0
    ray_cpus: int | None = None
    altered: Flags = field(default_factory=dict)
    interrupted: int | None = None

    def run(self, checkout: Checkout, folder: Path, **more: Any) -> None:
        """Run the command with its outputs in a folder; `more` are further flags."""
        flags = {**self.flags, **more}
        filled = {name: fill(value, folder) for name, value in flags.items()}
        checkout.run(self.command, filled, self.ray_cpus)

    def compare(self, old: Path, new: Path) -> list[Comparison]:
        """Compare the outputs of two runs by their folders."""
        return [output.compare(old, new, self.limit) for output in self.outputs]


def fill(value: Any, folder: Path) -> Any:
    """Put the folder of the run into the value of a flag."""
    return value.replace("{out}", str(folder)) if isinstance(value, str) else value


SCALE = {"num_workers": 1, "cpus_per_worker": 1, "use_gpu": False}


def train_flags(inputs: Inputs, **more: Any) -> dict[str, Any]:
    """Return the flags of a small fine-tuning run."""
    flags: dict[str, Any] = {
        "model_name_or_path": inputs.path("model"),
        "train_data": [inputs.path("groups.jsonl")],
        "output_dir": "{out}",
        "max_steps": STEPS,
        "global_batch_size": 6,
        "train_group_size": 4,
        "query_max_len": 12,
        "passage_max_len": 24,
        "learning_rate": 1e-3,
        "temperature": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "log_rows": True,
        "use_cpu": True,
        "seed": 42,
        **SCALE,
    }
    return flags | more


def pretrain_flags(inputs: Inputs, method: str, model: str) -> dict[str, Any]:
    """Return the flags of a small pre-training run."""
    different = ("train_group_size", "query_max_len", "passage_max_len", "temperature")
    flags = {name: value for name, value in train_flags(inputs).items() if name not in different}
    texts = {"train_data": [inputs.path("texts.jsonl")], "max_seq_length": 24, "pretrain_method": method}
    return flags | texts | {"model_name_or_path": model}


def mine_flags(inputs: Inputs, **more: Any) -> dict[str, Any]:
    """Return the flags of a small mining run."""
    flags: dict[str, Any] = {
        "model_name_or_path": inputs.path("model"),
        "input_file": [inputs.path("unscored.jsonl")],
        "candidate_pool": [inputs.path("corpus.jsonl")],
        "output_file": "{out}/mined.jsonl",
        "range_for_sampling": "2-60",
        "negative_number": 7,
        "seed": 42,
        **SCALE,
    }
    return flags | more


def evaluate_flags(inputs: Inputs, **more: Any) -> dict[str, Any]:
    """Return the flags of a small evaluation."""
    flags: dict[str, Any] = {
        "encoder": inputs.path("model"),
        "corpus_data": [inputs.path("corpus.jsonl")],
        "query_data": [inputs.path("queries.jsonl")],
        "metrics_file": "{out}/metrics.json",
        "run_file": "{out}/run.trec",
        **SCALE,
    }
    return flags | more


def merge_flags(*models: str, **more: Any) -> dict[str, Any]:
    """Return the flags of a merge."""
    models_and_type = {"model_names_or_paths": list(models), "model_type": "encoder"}
    return models_and_type | {"output_path": "{out}/merged"} | more


def encode_flags(inputs: Inputs, output: str, **more: Any) -> dict[str, Any]:
    """Return the flags of a small encoding run."""
    files = {"input_file": [inputs.path("corpus.jsonl")], "output_file": f"{{out}}/{output}"}
    return {"model_name_or_path": inputs.path("model")} | files | SCALE | more


LOG = Output("", read_log, "{n} logged series")
ROWS = Output("rows", read_files, "rows of each step", always_altered=False)
MINED = (Output("mined.jsonl", read_bytes, "mined bytes"),)
METRICS = (Output("metrics.json", read_metrics, "{n} metrics"), Output("run.trec", read_bytes, "ranking bytes"))
VECTORS = (Output("vectors.npy", read_vectors, "vectors"),)
TABLE = (Output("vectors.parquet", read_vectors, "{n} columns and schema"),)
MERGED = (Output("merged", read_weights, "{n} tensors"),)


def train_cases(inputs: Inputs) -> list[Case]:
    """Return the cases of raybge.train."""
    groups = inputs.path("groups.jsonl")

    def train(name: str, case: Flags | None = None, **more: Any) -> Case:
        flags = train_flags(inputs, **more)
        weights = Output("", read_weights, "{n} tensors", initial=flags["model_name_or_path"])
        return Case(f"train-{name}", "train", flags, (LOG, weights, ROWS), **(case or {}))

    several = {"limit": MULTI_WORKER_LIMIT, "ray_cpus": 6}
    sgd_case = {**several, "altered": {"learning_rate": 0.0500005}}
    distilled = {"knowledge_distillation": True, "kd_loss_type": "m3_kd_loss"}
    margin = {"false_negative_margin": 0.05, "bidirectional": True, "score_block": 7}
    instructions = {"query_instruction_for_retrieval": WORDS[0], "passage_instruction_for_retrieval": WORDS[1]}
    evaluation = {"eval_data": [inputs.path("queries.jsonl")], "eval_corpus": [inputs.path("corpus.jsonl")]}
    data_sets = {"train_data": [groups, inputs.path("own_no_in_batch_neg.jsonl")], "dataset_weights": [f"{groups}=2"]}
    adapters = {"use_lora": True, "lora_rank": 4, "save_merged_lora_model": True}
    selected = [
        train("1-worker", {"altered": {"seed": 43}}),
        train("1-worker-dropout", model_name_or_path=inputs.path("dropout")),
        train("2-workers", several, num_workers=2),
        # SGD: AdamW would amplify a difference in rounding, so that the limit would mean bit for bit.
        train("3-workers-sgd", sgd_case, num_workers=3, optim="sgd", learning_rate=0.05),
        train("sub-batch", sub_batch_size=4),
        train("2-workers-sub-batch", several, num_workers=2, sub_batch_size=4),
        train("distillation", **distilled),
        train("2-workers-distillation", several, num_workers=2, **distilled),
        train("kl-div", knowledge_distillation=True),
        train("mrl", use_mrl=True, mrl_dims=[8, 16, 32]),
        train("2-workers-local-negatives", several, num_workers=2, negatives_cross_device=False),
        train("margin-bidirectional", **margin),
        train("guide", false_negative_margin=0.1, guide_model=inputs.path("tuned")),
        train("instructions-accumulation", gradient_accumulation_steps=2, warmup_ratio=0.2, **instructions),
        train("cls-sgd", sentence_pooling_method="cls", normlized=False, optim="sgd", temperature=1.0),
        train("data-sets", same_dataset_within_batch=True, shuffle_ratio=0.5, **data_sets),
        train("evaluation", eval_strategy="steps", eval_steps=10, **evaluation),
        train("resume", {"interrupted": STEPS // 2}, save_strategy="steps", save_steps=STEPS // 2),
    ]
    if importlib.util.find_spec("peft"):
        selected.append(train("lora", **adapters))
    return selected


def pretrain_cases(inputs: Inputs) -> list[Case]:
    """Return the cases of raybge.pretrain: with the model's own head, and with a new one."""

    def pretrain(method: str, model: str, **options: Any) -> Case:
        weights = Output("encoder_model", read_weights, "{n} tensors", initial=model)
        flags = pretrain_flags(inputs, method, model)
        return Case(f"pretrain-{method}", "pretrain", flags, (LOG, weights, ROWS), **options)

    return [
        pretrain("retromae", inputs.path("masked"), altered={"seed": 43}),
        pretrain("dupmae", inputs.path("model")),
    ]


def search_cases(inputs: Inputs) -> list[Case]:
    """Return the cases of raybge.mine, raybge.evaluate and raybge.encode."""
    shards = {"num_workers": 2, "shard_size": 50, "search_batch_size": 16}
    margins = {"relative_margin": 0.05, "max_score": 0.95, "sampling_strategy": "top", "keep_scores": True}
    cross_encoder = {"cross_encoder": inputs.path("classifier"), "range_for_sampling": "2-20"}
    small_table = encode_flags(inputs, "vectors.parquet", precision="int8", truncate_dim=16)
    return [
        Case("mine", "mine", mine_flags(inputs), MINED, altered={"seed": 43}),
        Case("mine-2-actors", "mine", mine_flags(inputs, **shards), MINED, ray_cpus=6),
        Case("mine-own-pool-margins", "mine", mine_flags(inputs, candidate_pool=None, **margins), MINED),
        Case("mine-cross-encoder", "mine", mine_flags(inputs, **cross_encoder), MINED),
        Case("evaluate", "evaluate", evaluate_flags(inputs), METRICS, altered={"pooling_method": "cls"}),
        Case("encode", "encode", encode_flags(inputs, "vectors.npy"), VECTORS, altered={"max_length": 8}),
        Case("encode-int8-parquet", "encode", small_table, TABLE),
    ]


def merge_cases(inputs: Inputs) -> list[Case]:
    """Return the cases of raybge.merge."""
    base, tuned, other = (inputs.path(name) for name in ("model", "tuned", "other"))
    ties = {"merge_method": "ties", "base_model": base, "weights": [0.5, 0.5]}
    examples = {"example_data": [inputs.path("examples.jsonl")], **SCALE}
    search = {"search": [inputs.path("queries.jsonl")], "search_corpus": [inputs.path("corpus.jsonl")], **SCALE}
    altered = {"weights": [0.31, 0.69]}
    return [
        Case("merge-weights", "merge", merge_flags(base, tuned, weights=[0.3, 0.7]), MERGED, altered=altered),
        Case("merge-slerp", "merge", merge_flags(base, tuned, weights=[0.3, 0.7], merge_method="slerp"), MERGED),
        Case("merge-ties", "merge", merge_flags(tuned, other, **ties), MERGED),
        Case("merge-examples", "merge", merge_flags(base, tuned, **examples), MERGED),
        Case("merge-search", "merge", merge_flags(base, tuned, **search), MERGED),
    ]


def cases(inputs: Inputs) -> list[Case]:
    """Return all cases."""
    return [*train_cases(inputs), *pretrain_cases(inputs), *search_cases(inputs), *merge_cases(inputs)]
