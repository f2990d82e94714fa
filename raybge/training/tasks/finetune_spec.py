"""Spec of fine-tuning: read from the flags and checked before anything loads.

Importing this module imports no torch: the driver makes a spec, the workers build the model from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from raybge.cli.checks import check_at_least, check_requires
from raybge.cli.options import TrainOptions
from raybge.model.folder import read_settings
from raybge.model.folder_checks import check_model_folder
from raybge.model.spec import EncoderSpec, absolute_model_path
from raybge.training.spec import data_seed_of
from raybge.training.tasks.objective_spec import (
    ObjectiveSpec,
    check_objective_options,
    false_negative_margin,
)
from raybge.util.errors import UserError
from raybge.util.plural import plural

if TYPE_CHECKING:
    from raybge.data.datasets import DataSets
    from raybge.data.groups import Group
    from raybge.data.jsonl import Parse
    from raybge.data.survey import Survey
    from raybge.evaluation.spec import ValidationSpec
    from raybge.model.lora import Lora
    from raybge.training.tasks.finetune_task import FinetuneTask


@dataclass(frozen=True)
class FinetuneSpec:
    """Fine-tuning of an embedding model on groups, with a contrastive objective.

    Args:
        base_model: the model as it was given.
        encoder: the model; `query_max_len` and `passage_max_len` limit its texts.
        objective: the loss and which passages are negatives.
        query_max_len: longest query in tokens, special ones included.
        passage_max_len: longest passage in tokens, special ones included.
        group_size: passages of a group, one positive and the rest negatives.
        seed: seed of the draw of passages.
        shuffle_ratio: share of the long positives whose three parts are shuffled.
        scored: rows have a cross-encoder's scores, which are distilled.
        sub_batch_size: texts whose activations are held at a time; None: all.
        sub_batch_tokens: tokens, with padding, whose activations are held at a time; None: no limit.
        pad_to_multiple_of: lengths are padded to a multiple of this.
        fix_position_embedding: position embeddings are not trained.
        merge_adapters: save the whole model with its adapters added, not the adapters.
        guide: model whose cosines decide which negatives are false; None: the one in training.
        validation: queries and corpus of the evaluation while training.
        allow_unknown_tokens: words of the data may be unknown to the tokenizer.
    """

    base_model: str
    encoder: EncoderSpec
    objective: ObjectiveSpec
    query_max_len: int
    passage_max_len: int
    group_size: int
    seed: int
    shuffle_ratio: float = 0.0
    scored: bool = False
    sub_batch_size: int | None = None
    sub_batch_tokens: int | None = None
    pad_to_multiple_of: int | None = None
    fix_position_embedding: bool = False
    merge_adapters: bool = False
    guide: EncoderSpec | None = None
    validation: ValidationSpec | None = None
    allow_unknown_tokens: bool = False

    command: ClassVar[str] = "train"
    row_noun: ClassVar[str] = "group"
    model_folder: ClassVar[str] = ""

    @classmethod
    def from_options(cls, options: TrainOptions) -> FinetuneSpec:
        """Read and check the flags of fine-tuning.

        Args:
            options: the command's flags.

        Returns:
            The spec.

        Raises:
            UserError: flags out of range or that do not go together; no model at a path that is given.
        """
        from raybge.data.prompts import Instructions
        from raybge.evaluation.spec import ValidationSpec

        _check_finetune_options(options)
        # A wrong format is reported now, not when the trained model is saved.
        Instructions(
            options.query_instruction_for_retrieval,
            options.query_instruction_format,
            options.passage_instruction_for_retrieval,
            options.passage_instruction_format,
        ).prefixes()
        check_model_folder(options.model_name_or_path, "--model_name_or_path", options.tokenizer_name)
        guide, lora = _guide(options), _lora(options)
        sub_batch_size = options.sub_batch_size
        return cls(
            base_model=options.model_name_or_path,
            encoder=EncoderSpec.from_options(
                options, use_fp16=False, query_max_length=None, passage_max_length=None, lora=lora
            ),
            objective=ObjectiveSpec.from_options(options),
            query_max_len=options.query_max_len,
            passage_max_len=options.passage_max_len,
            group_size=options.train_group_size,
            seed=data_seed_of(options),
            shuffle_ratio=options.shuffle_ratio,
            scored=options.knowledge_distillation,
            sub_batch_size=None if sub_batch_size is None or sub_batch_size < 0 else sub_batch_size,
            sub_batch_tokens=options.sub_batch_tokens,
            pad_to_multiple_of=options.pad_to_multiple_of,
            fix_position_embedding=options.fix_position_embedding,
            merge_adapters=options.save_merged_lora_model,
            guide=guide,
            validation=ValidationSpec.from_options(options),
            allow_unknown_tokens=options.allow_unknown_tokens,
        )

    @property
    def trained_lengths(self) -> dict[str, int]:
        """Most tokens of a query and of a passage."""
        return {"queries": self.query_max_len, "passages": self.passage_max_len}

    @property
    def row_parser(self) -> Parse:
        """Parser of a group, with scores if they are distilled."""
        from raybge.data.groups import parse_group, parse_scored_group

        return parse_scored_group if self.scored else parse_group

    def describe(self) -> tuple[str, str]:
        """Return the plan's line on the model, and the text that follows the size of a step."""
        settings = read_settings(self.base_model, self.encoder.cache_dir, self.encoder.token)
        source = "from the model's folder" if settings.source == "modules.json" else "defaults: the folder sets none"
        pooling, normalize = self.encoder.pooling_method, self.encoder.normalize_embeddings
        normalized = "normalized" if (settings.normalize if normalize is None else normalize) else "not normalized"
        if not self.objective.in_batch:
            negatives = "the own group"
        elif self.objective.cross_device:
            negatives = "all groups of a step"
        else:
            negatives = f"blocks of {self.objective.block} groups"
        return (
            f"model: {self.base_model}, {pooling or settings.pooling} pooling, {normalized} "
            f"({source}), query {self.query_max_len} / passage {self.passage_max_len} tokens",
            f" of {self.group_size}; negatives from {negatives}",
        )

    def check_model(self, survey: Survey) -> None:
        """Check model and tokenizer on a sample of the rows, and the guide's."""
        from raybge.model.preflight import word_sample

        self.encoder.check(None if self.allow_unknown_tokens else partial(word_sample, survey, self.row_parser))
        if self.guide:
            self.guide.check()

    def row_notes(self, survey: Survey) -> list[str]:
        """Return the line on groups with fewer negatives than a step takes, if there are any."""
        from raybge.data.text_sample import sample_values

        groups: list[Group] = sample_values(survey, self.row_parser)
        wanted = self.group_size - 1
        counts = [len(group.neg) for group in groups]
        few, none = sum(0 < count < wanted for count in counts), counts.count(0) if wanted else 0
        if not few + none:
            return []
        sampled = "" if len(groups) == survey.total_rows else " in a sample"
        notes = [f"{few:,} have fewer, which are repeated"] * bool(few) + [f"{none:,} have none"] * bool(none)
        return [
            f"negatives: a group takes {wanted:,} (--train_group_size {self.group_size}); of "
            f"{plural(len(groups), 'group')}{sampled} {' and '.join(notes)}; raybge.mine finds more"
        ]

    def task(self, survey: Survey, data_sets: DataSets) -> FinetuneTask:
        """Return the task on these data sets."""
        from raybge.training.tasks.finetune_task import FinetuneTask

        return FinetuneTask(self, data_sets.alone)


def _lora(options: TrainOptions) -> Lora | None:
    """Return the adapters to train; None without --use_lora."""
    from raybge.model.lora import Lora

    _check_lora_options(options)
    if not options.use_lora:
        return None
    targets = options.target_modules
    return Lora(
        options.lora_rank, options.lora_alpha, options.lora_dropout, None if targets is None else tuple(targets)
    )


def _guide(options: TrainOptions) -> EncoderSpec | None:
    """Return the spec of the guide model, which shares the flags of the hub and no others."""
    if options.guide_model is None:
        return None
    check_model_folder(options.guide_model, "--guide_model")
    return EncoderSpec(
        absolute_model_path(options.guide_model),
        use_fp16=False,
        trust_remote_code=options.trust_remote_code,
        cache_dir=options.cache_dir,
        token=options.token,
    )


# --- checks of the flags ----------------------------------------------------------------------------------------------


def _check_finetune_options(options: TrainOptions) -> None:
    """Raise UserError for flags of fine-tuning that are out of range or do not go together."""
    lengths = ("query_max_len", "passage_max_len", "pad_to_multiple_of")
    check_at_least(1, options, "train_group_size", *lengths, "score_block", "sub_batch_tokens")
    if not 0 <= options.shuffle_ratio <= 1:
        raise UserError(f"--shuffle_ratio must be from 0 to 1, found {options.shuffle_ratio}")
    if options.sub_batch_size == 0:
        raise UserError("--sub_batch_size must be at least 1, or -1 to hold the whole batch, found 0")
    if options.sub_batch_tokens is not None and options.sub_batch_size is not None:
        raise UserError("--sub_batch_size and --sub_batch_tokens limit the same memory: give one")
    check_objective_options(options)
    if options.guide_model and false_negative_margin(options) is None:
        raise UserError("--guide_model requires --false_negative_margin, above -2")


def _check_lora_options(options: TrainOptions) -> None:
    """Raise UserError for flags of low-rank adapters without --use_lora, or that do not go together with it."""
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules", "save_merged_lora_model"):
        check_requires(options, name, "use_lora")
    if options.use_lora and options.fix_position_embedding:
        raise UserError("--fix_position_embedding has no effect with --use_lora, which trains adapters only: remove it")
    if options.use_lora and options.config_name and not options.save_merged_lora_model:
        raise UserError("--config_name: adapters have no configuration of their own: add --save_merged_lora_model")
