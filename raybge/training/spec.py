"""What the flags of training say together: checked before anything is read, and as the objects that training takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raybge.cli.options import TrainOptions
from raybge.cli.parser import declared
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.data.source_files import SourceFile
    from raybge.losses.objective import Objective
    from raybge.model.lora import Lora

# With vectors of length 1 scores lie between -1 and 1: divided by more than this, no passage stands out.
HIGHEST_TEMPERATURE = 0.5


def check_recipe(arguments: TrainOptions) -> None:
    """Everything that raybge's own flags can get wrong by themselves or together. Raises UserError."""
    from raybge.data.prompts import Instructions
    from raybge.model.folder import check_model_folder

    _check_numbers(arguments)
    # Now, and not when the trained model is saved.
    Instructions(
        arguments.query_instruction_for_retrieval,
        arguments.query_instruction_format,
        arguments.passage_instruction_for_retrieval,
        arguments.passage_instruction_format,
    ).prefixes()
    check_model_folder(arguments.model_name_or_path, "--model_name_or_path")
    if arguments.guide_model is not None:
        check_model_folder(arguments.guide_model, "--guide_model")
    lora_of(arguments)
    _check_objective(arguments)


def _check_numbers(arguments: TrainOptions) -> None:
    for name in ("train_group_size", "query_max_len", "passage_max_len", "pad_to_multiple_of", "score_block"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}")
    if not 0 <= arguments.shuffle_ratio <= 1:
        raise UserError(f"--shuffle_ratio must be from 0 to 1, found {arguments.shuffle_ratio}")
    if arguments.sub_batch_size == 0:
        raise UserError("--sub_batch_size must be at least 1, or -1 to hold the whole batch, found 0")


def _check_objective(arguments: TrainOptions) -> None:
    if arguments.temperature <= 0:
        raise UserError(f"--temperature must be above 0, found {arguments.temperature}")
    if arguments.temperature > HIGHEST_TEMPERATURE and normalized(arguments):
        raise UserError(
            f"--temperature must be at most {HIGHEST_TEMPERATURE} with normalised vectors, found "
            f"{arguments.temperature}: common values are 0.01 to 0.05"
        )
    _needs(arguments, "kd_loss_type", "knowledge_distillation")
    if arguments.knowledge_distillation and arguments.train_group_size < 2:
        raise UserError("--knowledge_distillation compares the passages of a group: --train_group_size must be above 1")
    _needs(arguments, "mrl_dims", "use_mrl")
    if arguments.use_mrl:
        _check_dims(arguments)
    if arguments.bidirectional and not arguments.use_inbatch_neg:
        raise UserError("--bidirectional finds a query among those of other groups: it needs --use_inbatch_neg")
    _needs(arguments, "guide_model", "false_negative_margin")


def _check_dims(arguments: TrainOptions) -> None:
    from raybge.model.folder import vector_width

    dims = arguments.mrl_dims
    if not dims:
        raise UserError("--use_mrl needs --mrl_dims, e.g. --mrl_dims 64 128 256")
    width = vector_width(arguments.config_name or arguments.model_name_or_path, arguments.cache_dir, arguments.token)
    for dim in dims:
        if dim < 1 or (width is not None and dim > width):
            most = f" to {width}, the model's width" if width else " up"
            raise UserError(f"--mrl_dims must be from 1{most}, found {dim}")
    if len(set(dims)) < len(dims):
        raise UserError(f"--mrl_dims names a length twice: {' '.join(map(str, dims))}")


def inputs_of(arguments: TrainOptions, files: Sequence[SourceFile]) -> dict[str, list[str | None]]:
    """What every worker reads, by flag: the training files `files`, those to evaluate on, and the models."""
    from raybge.data.source_files import list_files

    paths: dict[str, list[str | None]] = {"--train_data": [file.path for file in files]}
    for name in ("eval_data", "eval_corpus"):
        given = getattr(arguments, name)
        paths[f"--{name}"] = [file.path for file in list_files(given, f"--{name}")] if given else []
    for name in ("model_name_or_path", "config_name", "tokenizer_name", "guide_model"):
        paths[f"--{name}"] = [getattr(arguments, name)]
    return paths


def _needs(arguments: TrainOptions, name: str, other: str) -> None:
    """A flag that acts only beside another one."""
    given = getattr(arguments, name) != declared(TrainOptions)[name].default
    beside = getattr(arguments, other)
    if given and (beside is None or beside is False):
        raise UserError(f"--{name} says something of what is not given: it needs --{other}")


def normalized(arguments: TrainOptions) -> bool:
    """Whether vectors get length 1: the flag, else what the model's folder says."""
    from raybge.model.folder import read_settings

    if arguments.normalize_embeddings is not None:
        return arguments.normalize_embeddings
    return read_settings(arguments.model_name_or_path, arguments.cache_dir, arguments.token).normalize


def objective_of(arguments: TrainOptions, block: int) -> Objective:
    """The objective; `block`: groups from which negatives come when they do not come from all workers."""
    from raybge.losses.objective import Objective

    return Objective(
        temperature=arguments.temperature,
        in_batch=arguments.use_inbatch_neg,
        cross_device=arguments.negatives_cross_device,
        block=block,
        bidirectional=arguments.bidirectional,
        distillation=arguments.kd_loss_type if arguments.knowledge_distillation else None,
        mrl_dims=tuple(arguments.mrl_dims or ()),
        normalized=normalized(arguments),
        mask_known=arguments.mask_known_positives,
        margin=arguments.false_negative_margin,
        score_block=arguments.score_block,
    )


def sub_batch_size_of(arguments: TrainOptions) -> int | None:
    """Texts whose activations are held at a time; None, and the recipe's -1, for all."""
    size = arguments.sub_batch_size
    return None if size is None or size < 0 else size


def lora_of(arguments: TrainOptions) -> Lora | None:
    """The adapters that the flags ask for; None for none."""
    from raybge.model.lora import Lora

    for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "save_merged_lora_model"):
        _needs(arguments, name, "use_lora")
    if not arguments.use_lora:
        return None
    if arguments.fix_position_embedding:
        raise UserError("--fix_position_embedding: with --use_lora only the adapters are trained anyway")
    if arguments.config_name and not arguments.save_merged_lora_model:
        raise UserError("--config_name: adapters carry no configuration of their own: add --save_merged_lora_model")
    targets: Any = arguments.target_modules
    return Lora(
        arguments.lora_rank,
        arguments.lora_alpha,
        arguments.lora_dropout,
        None if targets is None else tuple(targets),
    )
