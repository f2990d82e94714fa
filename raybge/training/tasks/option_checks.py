"""Checks of the flags of fine-tuning and pre-training: ranges, and flags that require or exclude one another."""

from __future__ import annotations

from raybge.cli.options import PretrainOptions, TrainOptions
from raybge.cli.parser import declared_flags
from raybge.model.folder import read_settings, vector_width
from raybge.util.errors import UserError

# With normalised vectors scores lie between -1 and 1: divided by more than this, no passage stands out.
HIGHEST_TEMPERATURE = 0.5
SHORTEST_TEXT = 3  # tokens of pre-training: the special ones around a text, and one to predict


def check_finetune_options(options: TrainOptions) -> None:
    """Raise UserError for flags of fine-tuning that are out of range or do not go together."""
    for name in ("train_group_size", "query_max_len", "passage_max_len", "pad_to_multiple_of", "score_block"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}")
    if not 0 <= options.shuffle_ratio <= 1:
        raise UserError(f"--shuffle_ratio must be from 0 to 1, found {options.shuffle_ratio}")
    if options.sub_batch_size == 0:
        raise UserError("--sub_batch_size must be at least 1, or -1 to hold the whole batch, found 0")
    if options.temperature <= 0:
        raise UserError(f"--temperature must be above 0, found {options.temperature}")
    _requires(options, "kd_loss_type", "knowledge_distillation")
    if options.knowledge_distillation and options.train_group_size < 2:
        raise UserError("--knowledge_distillation compares the passages of a group: --train_group_size must be above 1")
    _requires(options, "mrl_dims", "use_mrl")
    if options.bidirectional and not options.use_inbatch_neg:
        raise UserError("--bidirectional searches a query among those of other groups: it requires --use_inbatch_neg")
    _requires(options, "guide_model", "false_negative_margin")


def check_temperature(options: TrainOptions) -> None:
    """Raise UserError for a temperature at which no score of normalised vectors stands out."""
    if options.temperature <= HIGHEST_TEMPERATURE:
        return
    normalized = options.normalize_embeddings
    if normalized is None:
        normalized = read_settings(options.model_name_or_path, options.cache_dir, options.token).normalize
    if normalized:
        raise UserError(
            f"--temperature must be at most {HIGHEST_TEMPERATURE} with normalised vectors, found "
            f"{options.temperature}: common values are 0.01 to 0.05"
        )


def check_mrl_dims(options: TrainOptions) -> None:
    """Raise UserError for Matryoshka dimensions that are missing, repeated or wider than the model's vectors."""
    if not options.use_mrl:
        return
    dims = options.mrl_dims
    if not dims:
        raise UserError("--use_mrl requires --mrl_dims, for example --mrl_dims 64 128 256")
    width = vector_width(options.config_name or options.model_name_or_path, options.cache_dir, options.token)
    for dim in dims:
        if dim < 1 or (width is not None and dim > width):
            most = f" to {width}, the model's width" if width else " up"
            raise UserError(f"--mrl_dims must be from 1{most}, found {dim}")
    if len(set(dims)) < len(dims):
        raise UserError(f"--mrl_dims must be different lengths, found {' '.join(map(str, dims))}")


def check_lora_options(options: TrainOptions) -> None:
    """Raise UserError for flags of low-rank adapters without --use_lora, or that do not go together with it."""
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "save_merged_lora_model"):
        _requires(options, name, "use_lora")
    if options.use_lora and options.fix_position_embedding:
        raise UserError("--fix_position_embedding has no effect with --use_lora, which trains adapters only: remove it")
    if options.use_lora and options.config_name and not options.save_merged_lora_model:
        raise UserError("--config_name: adapters have no configuration of their own: add --save_merged_lora_model")


def check_pretrain_options(options: PretrainOptions) -> None:
    """Raise UserError for flags of pre-training that are missing, out of range or without effect."""
    if options.model_name_or_path is None and (options.config_name is None or options.tokenizer_name is None):
        raise UserError("missing: --model_name_or_path, or --config_name and --tokenizer_name to start from scratch")
    if options.max_seq_length < SHORTEST_TEXT:
        raise UserError(f"--max_seq_length must be at least {SHORTEST_TEXT}, found {options.max_seq_length}")
    for name in ("encoder_mlm_probability", "decoder_mlm_probability"):
        if not 0 < getattr(options, name) < 1:
            raise UserError(f"--{name} must be above 0 and below 1, found {getattr(options, name)}")
    for name in ("eval_strategy", "do_eval", "eval_on_start"):
        if options.training.get(name) not in (None, False, "no"):
            raise UserError(f"--{name} is not supported by raybge.pretrain: remove it, and evaluate after fine-tuning")
    if options.bow_loss_weight <= 0:
        raise UserError(f"--bow_loss_weight must be above 0, found {options.bow_loss_weight}")


def _requires(options: TrainOptions, name: str, other: str) -> None:
    """Raise UserError if a flag is set that has no effect without another one."""
    is_set = getattr(options, name) != declared_flags(TrainOptions)[name].default
    needed = getattr(options, other)
    if is_set and (needed is None or needed is False):
        raise UserError(f"--{name} requires --{other}")
