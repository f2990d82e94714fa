"""Fine-tune an embedding model on groups {"query", "pos", "neg"}.

    python -m raybge.train --model_name_or_path BAAI/bge-small-en-v1.5 --train_data groups.jsonl --output_dir runs/mine
    python -m raybge.train --help

From Python: `raybge.finetune(model_name_or_path=..., train_data=..., output_dir=..., learning_rate=2e-5)`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge import cli
from raybge.arguments import TrainArguments
from raybge.checkpoints import HIDDEN, RESULTS, Identity, discard, finished, resumes, starting_point
from raybge.cluster import Cluster, Plan, connect, grown, plan_workers, reading_cpus
from raybge.errors import UserError
from raybge.flags import given
from raybge.recipe import check_recipe, inputs_of, lora_of, objective_of, sub_batch_size_of
from raybge.screen import Screen
from raybge.shared import check_shared
from raybge.training_flags import accumulation, process_group, training_arguments
from raybge.training_flags import check as check_training

if TYPE_CHECKING:
    from raybge.board import Board
    from raybge.checkpoints import Checkpoint
    from raybge.data.datasets import DataSets
    from raybge.data.jsonl import SourceFile
    from raybge.data.order import Order
    from raybge.data.survey import Survey
    from raybge.launch import OnMeasured
    from raybge.loop import WorkerConfig


def finetune(**flags: Any) -> dict[str, float]:
    """Fine-tune a model; the arguments are the command's flags. Returns the Trainer's metrics.

    Raises UserError, before any model loads, for flags, files or rows that cannot be used.
    """
    return cli.call(TrainArguments, train, "train", flags)


def train(
    arguments: TrainArguments, screen: Screen, on_measured: OnMeasured | None = None, runs: int = 1
) -> dict[str, float]:
    """The command: check, read, plan, train, report.

    `on_measured` hears of each evaluation; `runs` like this one share the cluster.
    """
    from raybge.data.files import list_files
    from raybge.data.survey import IN_PROCESS_BYTES

    output = _check(arguments)
    if resumes(arguments.training, arguments.resume) and (metrics := finished(output)):
        screen.say(f"nothing to continue: the run of {output} is finished")
        return metrics
    start = starting_point(arguments.training, arguments.resume, _storage(arguments, output))
    if start and arguments.global_batch_size is None:
        # The workers may be others than at the start; what the objective depends on is not.
        arguments = replace(arguments, global_batch_size=start.identity.global_batch)
    files = list_files(arguments.train_data, "--train_data")
    # Small data is read before Ray starts, so that what is wrong with it is said at once.
    small = _survey(arguments, files, output) if sum(f.size for f in files) <= IN_PROCESS_BYTES else None
    written = {"--output_dir": str(output), "--storage_path": str(_storage(arguments, output))}
    wanted = arguments.num_workers, _use_gpu(arguments), arguments.cpus_per_worker
    with connect(arguments.address, arguments.verbose) as cluster:
        cluster = grown(cluster, *wanted, screen.say)
        check_shared(cluster, written, inputs_of(arguments, files))
        plan = plan_workers(cluster, *wanted)
        survey = small or _survey(arguments, files, output)
        if survey.bad_count:
            from raybge.data.survey import named

            screen.say(f"skipped {survey.bad_count:,} rows that cannot be used:\n{named(survey)}")
        batches = _order(arguments, survey, plan)
        _describe(arguments, screen, cluster, plan, survey, batches)
        _say_start(arguments, screen, start)
        metrics = _run(
            arguments, screen, plan, reading_cpus(cluster, plan, runs), survey, batches, output, start, on_measured
        )
    if arguments.dry_run:
        return {}
    screen.say(
        f"trained {metrics['steps']:,.0f} steps in {metrics['train_runtime']:,.0f} s "
        f"({metrics['train_samples_per_second']:,.1f} groups/s), mean loss {metrics['train_loss']:.4f}"
    )
    screen.say(f"model: {arguments.training['output_dir']}")
    return metrics


def _say_start(arguments: TrainArguments, screen: Screen, start: Checkpoint | None) -> None:
    if start:
        screen.say(f"continues from {start.path}: {start.step:,} updates are done")
    elif resumes(arguments.training, arguments.resume):
        screen.say("nothing to continue: there is no whole checkpoint, the run starts from the beginning")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(TrainArguments, train, "train", argv)


# --- check ------------------------------------------------------------------------------------------------------------


def _check(arguments: TrainArguments) -> Path:
    """Everything that can be said about the flags alone; returns the output folder."""
    check_recipe(arguments)
    for name, place in (
        ("output_dir", arguments.training["output_dir"]),
        ("storage_path", arguments.storage_path),
    ):
        if place and "://" in place:
            raise UserError(
                f"--{name} {place}: training into a URI is not built yet; give a folder that all nodes share"
            )
    if _seed(arguments) < 0 or arguments.training.get("seed", 0) < 0:
        raise UserError("--seed and --data_seed must be at least 0")
    check_training(arguments)
    output = Path(os.path.abspath(arguments.training["output_dir"]))
    _check_output(arguments, output)
    return output


def _check_output(arguments: TrainArguments, output: Path) -> None:
    """Whether the output folder may be written."""
    resume = resumes(arguments.training, arguments.resume)
    if arguments.overwrite_output_dir and resume:
        raise UserError("--overwrite_output_dir removes the run that is to be continued: leave it out, or the other")
    if arguments.overwrite_output_dir and output in Path(os.path.abspath(arguments.model_name_or_path)).parents:
        raise UserError(
            f"--model_name_or_path {arguments.model_name_or_path} lies in the --output_dir that is to be overwritten"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output} is a file")
    storage = _storage(arguments, output)
    if not resume and not arguments.overwrite_output_dir and storage != output and any(storage.glob("checkpoint-*")):
        raise UserError(
            f"--storage_path {storage} holds checkpoints of another run; choose another, or add "
            "--overwrite_output_dir, or --resume to continue that run"
        )
    if not output.exists() or arguments.overwrite_output_dir or all(p.name == HIDDEN for p in output.iterdir()):
        return
    if not resume:
        raise UserError(
            f"--output_dir {output} is not empty; choose another, or add --overwrite_output_dir, or --resume to "
            "continue its run"
        )
    if not (output / HIDDEN).is_dir():
        raise UserError(f"--output_dir {output} is not empty, and there is no run in it to continue")


def _storage(arguments: TrainArguments, output: Path) -> Path:
    """Where checkpoints lie."""
    return Path(os.path.abspath(arguments.storage_path)) if arguments.storage_path else output


def _device_batch(arguments: TrainArguments) -> int:
    return arguments.training.get("per_device_train_batch_size", 8)


def _seed(arguments: TrainArguments) -> int:
    data_seed = arguments.training.get("data_seed")
    return arguments.training.get("seed", 42) if data_seed is None else data_seed


def _use_gpu(arguments: TrainArguments) -> bool | None:
    return False if arguments.training.get("use_cpu") else arguments.use_gpu


# --- read -------------------------------------------------------------------------------------------------------------


def _survey(arguments: TrainArguments, files: list[SourceFile], output: Path) -> Survey:
    """Count and check every row. Files that cannot be read from the middle are written out plain once."""
    from raybge.data.groups import parse_group, parse_scored_group
    from raybge.data.order import block_bytes
    from raybge.data.source import transcode
    from raybge.data.survey import survey

    storage = _storage(arguments, output)
    # Parquet too: a row group, often a million rows, would be read for each of its rows' windows.
    files = transcode(files, str(storage / HIDDEN / "data"), ("gzip", "zstd", "array", "parquet"))
    size = block_bytes(sum(f.size for f in files))
    parse = parse_scored_group if arguments.knowledge_distillation else parse_group
    return survey(files, size, parse, arguments.on_bad_rows, cache_dir=str(storage / HIDDEN))  # type: ignore[arg-type]


def _data_sets(arguments: TrainArguments, survey: Survey) -> DataSets:
    from raybge.data.datasets import arrange, parse_weights

    return arrange(
        survey,
        arguments.max_example_num_per_dataset,
        arguments.small_threshold,
        arguments.drop_threshold,
        parse_weights(arguments.dataset_weights or []),
        arguments.same_dataset_within_batch,
    )


# --- plan -------------------------------------------------------------------------------------------------------------


def _order(arguments: TrainArguments, survey: Survey, plan: Plan) -> Order:
    from raybge.data.order import Order, window_rows

    global_batch = arguments.global_batch_size or _device_batch(arguments) * plan.workers
    drop_last = arguments.training.get("dataloader_drop_last", False)
    mixture = _data_sets(arguments, survey).mixture
    window = window_rows(sum(f.size for f in survey.files), survey.total_rows)
    order = Order(survey.rows, global_batch, _seed(arguments), drop_last, mixture, window)
    order.owned(0, plan.workers)
    if not order.steps:
        raise UserError(
            f"{order.total:,} rows are less than one global batch of {global_batch:,}, and --dataloader_drop_last "
            "leaves out what is not full"
        )
    return order


def _describe(
    arguments: TrainArguments, screen: Screen, cluster: Cluster, plan: Plan, survey: Survey, order: Order
) -> None:
    from raybge.model.folder import read_settings

    settings = read_settings(arguments.model_name_or_path, arguments.cache_dir, arguments.token)
    pooling = arguments.sentence_pooling_method or settings.pooling
    normalize = settings.normalize if arguments.normlized is None else arguments.normlized
    says = "the model's folder" if settings.source == "modules.json" else "defaults: the folder does not say"
    screen.say(f"cluster: {cluster.describe()}; {plan.describe('training worker')}")
    screen.say(
        f"model: {arguments.model_name_or_path}, {pooling} pooling, {'' if normalize else 'not '}normalised ({says}), "
        f"query {arguments.query_max_len} / passage {arguments.passage_max_len} tokens"
    )
    negatives = (
        "all groups of a step" if arguments.negatives_cross_device else f"blocks of {_device_batch(arguments)} groups"
    )
    screen.say(
        f"data: {order.total:,} groups an epoch from {len(survey.files)} file{'s' * (len(survey.files) != 1)}; "
        f"{order.steps:,} steps an epoch of {order.global_batch:,} groups of {arguments.train_group_size}; "
        f"negatives from {negatives if arguments.use_inbatch_neg else 'the own group'}"
    )
    for line in _data_sets(arguments, survey).describe(survey, order):
        screen.say(line)
    if not plan.gpus:
        for name in ("fp16", "bf16"):
            if arguments.training.get(name):
                screen.say(f"--{name} is off: there is no GPU, and half precision gains nothing on a CPU")


# --- run --------------------------------------------------------------------------------------------------------------


def _run(
    arguments: TrainArguments,
    screen: Screen,
    plan: Plan,
    reading: float,
    survey: Survey,
    order: Order,
    output: Path,
    start: Checkpoint | None,
    on_measured: OnMeasured | None,
) -> dict[str, float]:
    from raybge.board import Board
    from raybge.launch import Launch

    storage = _storage(arguments, output)
    hidden = output / HIDDEN
    hidden.mkdir(parents=True, exist_ok=True)
    run = f"run-{uuid.uuid4().hex}"
    markers = (hidden / run, storage / HIDDEN / run)
    for marker in markers:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    board = Board()
    try:
        config = _worker_config(arguments, plan, reading, survey, order, output, storage, markers, board)
        if start:
            start.check(config.identity)
            config = replace(config, resume_from=start.path)
        group = process_group(arguments, plan)
        for line in config.validation.lines() if config.validation else []:
            screen.say(line)
        if arguments.dry_run:
            return {}
        # Only now, when nothing more can be wrong with the flags. The old model stays until the new one is there.
        (output / RESULTS).unlink(missing_ok=True)
        if arguments.overwrite_output_dir:
            for old in storage.glob("checkpoint-*"):
                discard(old)
        notes = storage / HIDDEN / f"ray-{run}"
        launch = Launch(config, plan, group, storage, notes, arguments.max_failures, on_measured)
        return launch.watch(screen)
    finally:
        for marker in markers:
            marker.unlink(missing_ok=True)
        shutil.rmtree(storage / HIDDEN / f"ray-{run}", ignore_errors=True)


def _worker_config(
    arguments: TrainArguments,
    plan: Plan,
    reading: float,
    survey: Survey,
    order: Order,
    output: Path,
    storage: Path,
    markers: tuple[Path, ...],
    board: Board,
) -> WorkerConfig:
    from raybge.loop import WorkerConfig
    from raybge.validation import prepare

    return WorkerConfig(
        encoder=dict(
            model_name_or_path=_absolute(arguments.model_name_or_path),
            normalize_embeddings=arguments.normlized,
            pooling_method=arguments.sentence_pooling_method,
            query_instruction_for_retrieval=arguments.query_instruction_for_retrieval,
            query_instruction_format=arguments.query_instruction_format,
            passage_instruction_for_retrieval=arguments.passage_instruction_for_retrieval,
            passage_instruction_format=arguments.passage_instruction_format,
            trust_remote_code=arguments.trust_remote_code,
            cache_dir=arguments.cache_dir,
            tokenizer_name=arguments.tokenizer_name,
            config_name=arguments.config_name,
            token=arguments.token,
            use_fast_tokenizer=arguments.use_fast_tokenizer,
            lora=lora_of(arguments),
        ),
        lengths=dict(query_max_len=arguments.query_max_len, passage_max_len=arguments.passage_max_len),
        draws=dict(
            group_size=arguments.train_group_size,
            seed=_seed(arguments),
            shuffle_ratio=arguments.shuffle_ratio,
            alone=_data_sets(arguments, survey).alone,
            scored=arguments.knowledge_distillation,
        ),
        objective=objective_of(arguments, _device_batch(arguments)),
        sub_batch_size=sub_batch_size_of(arguments),
        guide=_guide(arguments),
        training=training_arguments(arguments, plan, order, storage),
        survey=survey,
        order=order,
        output_dir=str(output),
        markers=tuple(map(str, markers)),
        cpus=plan.cpus,
        reading_cpus=reading,
        fix_position_embedding=arguments.fix_position_embedding,
        merge_adapters=arguments.save_merged_lora_model,
        pad_to_multiple_of=arguments.pad_to_multiple_of,
        logging_dir=os.path.abspath(arguments.logging_dir) if arguments.logging_dir else None,
        board=board,
        identity=Identity.of(survey, order, accumulation(arguments)),
        validation=prepare(arguments, storage),
        card=_card(arguments, survey),
    )


def _guide(arguments: TrainArguments) -> dict[str, Any] | None:
    """Encoder's arguments for the guide model."""
    if arguments.guide_model is None:
        return None
    return dict(
        model_name_or_path=_absolute(arguments.guide_model),
        trust_remote_code=arguments.trust_remote_code,
        cache_dir=arguments.cache_dir,
        token=arguments.token,
    )


def _absolute(model: str) -> str:
    """A local folder's absolute path: a worker's current folder is Ray's. A hub's name as it is."""
    return os.path.abspath(model) if os.path.exists(model) else model


def _card(arguments: TrainArguments, survey: Survey) -> dict[str, Any]:
    """What the model card says of the run before it starts; secrets stay out of it."""
    import ray
    import torch
    import transformers

    from raybge import __version__

    rows = dict.fromkeys((f.name for f in survey.files), 0)
    for block, count in zip(survey.blocks, survey.rows, strict=True):
        rows[survey.files[block.file].name] += int(count)
    return dict(
        base_model=arguments.model_name_or_path,
        data=list(rows.items()),
        flags=given(arguments),
        versions={
            "raybge": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "ray": ray.__version__,
        },
    )


if __name__ == "__main__":
    raise SystemExit(main())
