"""What each training worker is told: the flags of `raybge.train`, the rows and the plan, made into one value.

Made in the driver, read in the workers; it knows nothing of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.arguments import TrainArguments
from raybge.checkpoints import Identity, digest
from raybge.data.token_files import TokenFiles
from raybge.flags import given
from raybge.recipe import lora_of, objective_of, sub_batch_size_of
from raybge.training_flags import accumulation, training_arguments

if TYPE_CHECKING:
    from raybge.board import Board
    from raybge.cluster import Plan
    from raybge.data.datasets import DataSets
    from raybge.data.order import Order
    from raybge.data.survey import Survey
    from raybge.launch import TrialContext
    from raybge.model.negatives import Objective
    from raybge.validation_data import ValidationConfig


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs to know, prepared by the driver.

    `encoder` are Encoder's arguments, `guide` those of the guide model's; `lengths` and `draws` are those of
    TextTokenizer and GroupTokenizer that are not the encoder's, `training` those of TrainingArguments, `card` those of
    Card that the run does not find out. `resume_from` is a whole checkpoint. Paths are absolute: a worker's current
    folder is Ray's. `kept` are tokens that other runs share, `before` is what `validation` finds of the model before
    training where that is known.
    """

    encoder: dict[str, Any]
    lengths: dict[str, int]
    draws: dict[str, Any]
    objective: Objective
    training: dict[str, Any]
    survey: Survey
    order: Order
    output_dir: str
    markers: tuple[str, ...]
    cpus: int
    reading_cpus: float
    fix_position_embedding: bool
    merge_adapters: bool
    pad_to_multiple_of: int | None
    logging_dir: str | None
    board: Board
    identity: Identity
    validation: ValidationConfig | None = None
    resume_from: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    sub_batch_size: int | None = None
    guide: dict[str, Any] | None = None
    kept: TokenFiles | None = None
    before: Mapping[str, float] | None = None


def worker_config(
    arguments: TrainArguments,
    plan: Plan,
    reading: float,
    survey: Survey,
    order: Order,
    output: Path,
    storage: Path,
    markers: tuple[Path, ...],
    board: Board,
    context: TrialContext,
) -> WorkerConfig:
    from raybge.validation_data import prepare

    identity = Identity.of(survey, order, accumulation(arguments))
    validation = prepare(arguments, storage)
    kept = context.tokens and TokenFiles(os.path.join(context.tokens, digest((identity, validation))))
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
            seed=seed_of(arguments),
            shuffle_ratio=arguments.shuffle_ratio,
            alone=data_sets_of(arguments, survey).alone,
            scored=arguments.knowledge_distillation,
        ),
        objective=objective_of(arguments, device_batch_of(arguments)),
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
        identity=identity,
        validation=validation,
        kept=kept or None,
        before=context.before,
        card=_card(arguments, survey),
    )


def data_sets_of(arguments: TrainArguments, survey: Survey) -> DataSets:
    from raybge.data.datasets import arrange, parse_weights

    return arrange(
        survey,
        arguments.max_example_num_per_dataset,
        arguments.small_threshold,
        arguments.drop_threshold,
        parse_weights(arguments.dataset_weights or []),
        arguments.same_dataset_within_batch,
    )


def device_batch_of(arguments: TrainArguments) -> int:
    return arguments.training.get("per_device_train_batch_size", 8)


def seed_of(arguments: TrainArguments) -> int:
    data_seed = arguments.training.get("data_seed")
    return arguments.training.get("seed", 42) if data_seed is None else data_seed


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
    from importlib.metadata import version

    from raybge import __version__

    return dict(
        base_model=arguments.model_name_or_path,
        data=list(survey.rows_by_file().items()),
        flags=given(arguments),
        versions={"raybge": __version__, **{name: version(name) for name in ("transformers", "torch", "ray")}},
    )
