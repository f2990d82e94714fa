"""Specs of the two training tasks, fine-tuning and pre-training: read from the flags and checked before anything loads.

Importing this module imports no torch: the driver makes a spec, the workers build the model from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from raybge.cli.options import LoopOptions, PretrainOptions, TrainOptions
from raybge.model.folder import check_model_folder, has_language_head, read_settings
from raybge.model.spec import EncoderSpec, absolute_model_path
from raybge.training.tasks.option_checks import (
    check_finetune_options,
    check_lora_options,
    check_mrl_dims,
    check_pretrain_options,
    check_temperature,
)

if TYPE_CHECKING:
    from raybge.data.datasets import DataSets
    from raybge.data.jsonl import Parse
    from raybge.data.survey import Survey
    from raybge.evaluation.spec import ValidationSpec
    from raybge.losses.objective import Objective
    from raybge.model.lora import Lora
    from raybge.training.tasks.finetuning import FinetuneTask
    from raybge.training.tasks.pretraining import PretrainTask

CHARACTERS_A_TOKEN = 8  # read of a text whose tokens are counted: most tokens have fewer


def device_batch_of(options: LoopOptions) -> int:
    """Return --per_device_train_batch_size."""
    return int(options.training.get("per_device_train_batch_size", 8))


def data_seed_of(options: LoopOptions) -> int:
    """Return the seed of the order of rows and of the draws: --data_seed, or --seed if that is unset."""
    data_seed = options.training.get("data_seed")
    return int(options.training.get("seed", 42) if data_seed is None else data_seed)


# --- fine-tuning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectiveSpec:
    """Keyword arguments of `Objective`, with the same names; see `Objective` for their meaning.

    `normalized` is not among them: without a flag the model's folder decides.
    """

    temperature: float
    in_batch: bool
    cross_device: bool
    block: int
    bidirectional: bool
    distillation: str | None
    mrl_dims: tuple[int, ...]
    mask_known: bool
    margin: float | None
    score_block: int | None

    @classmethod
    def from_options(cls, options: TrainOptions) -> ObjectiveSpec:
        """Read and check the flags of the objective.

        Args:
            options: the command's flags.

        Returns:
            The spec.

        Raises:
            UserError: a temperature or Matryoshka dimension that this model cannot be trained with.
        """
        check_temperature(options)
        check_mrl_dims(options)
        return cls(
            temperature=options.temperature,
            in_batch=options.use_inbatch_neg,
            cross_device=options.negatives_cross_device,
            block=device_batch_of(options),
            bidirectional=options.bidirectional,
            distillation=options.kd_loss_type if options.knowledge_distillation else None,
            mrl_dims=tuple(options.mrl_dims or ()),
            mask_known=options.mask_known_positives,
            margin=options.false_negative_margin,
            score_block=options.score_block,
        )

    def objective(self, normalized: bool) -> Objective:
        """Return the objective for vectors that are `normalized` to length 1, or not; imports torch."""
        from raybge.losses.objective import Objective

        return Objective(**vars(self), normalized=normalized)


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
        pad_to_multiple_of: lengths are padded to a multiple of this.
        fix_position_embedding: position embeddings are not trained.
        merge_adapters: save the whole model with its adapters added, not the adapters.
        guide: model whose cosines decide which negatives are false; None: the one in training.
        validation: queries and corpus of the evaluation while training.
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
    pad_to_multiple_of: int | None = None
    fix_position_embedding: bool = False
    merge_adapters: bool = False
    guide: EncoderSpec | None = None
    validation: ValidationSpec | None = None

    command: ClassVar[str] = "train"
    row_noun: ClassVar[str] = "groups"
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

        check_finetune_options(options)
        # A wrong format is reported now, not when the trained model is saved.
        Instructions(
            options.query_instruction_for_retrieval,
            options.query_instruction_format,
            options.passage_instruction_for_retrieval,
            options.passage_instruction_format,
        ).prefixes()
        check_model_folder(options.model_name_or_path, "--model_name_or_path")
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
            pad_to_multiple_of=options.pad_to_multiple_of,
            fix_position_embedding=options.fix_position_embedding,
            merge_adapters=options.save_merged_lora_model,
            guide=guide,
            validation=ValidationSpec.from_options(options),
        )

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
        normalized = "normalised" if (settings.normalize if normalize is None else normalize) else "not normalised"
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

    def task(self, survey: Survey, data_sets: DataSets) -> FinetuneTask:
        """Return the task on these data sets."""
        from raybge.training.tasks.finetuning import FinetuneTask

        return FinetuneTask(self, data_sets.alone)


def _lora(options: TrainOptions) -> Lora | None:
    """Return the adapters to train; None without --use_lora."""
    from raybge.model.lora import Lora

    check_lora_options(options)
    if not options.use_lora:
        return None
    targets = options.target_modules
    return Lora(
        options.lora_rank, options.lora_alpha, options.lora_dropout, None if targets is None else tuple(targets)
    )


def _guide(options: TrainOptions) -> EncoderSpec | None:
    """Return the guide model; it shares only where models are found and how they are opened."""
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


# --- pre-training -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainSpec:
    """Pre-training of an encoder for retrieval on texts, with RetroMAE's decoder.

    Args:
        base_model: model to start from as it was given; None: from scratch.
        model: keyword arguments of `load_pretraining_model`.
        max_seq_length: longest text in tokens.
        seed: seed of the masks.
        encoder_mlm_probability: share of the words that are masked for the encoder.
        decoder_mlm_probability: share of the words that a position of the decoder does not see.
    """

    base_model: str | None
    model: dict[str, Any]
    max_seq_length: int
    seed: int
    encoder_mlm_probability: float
    decoder_mlm_probability: float

    command: ClassVar[str] = "pretrain"
    row_noun: ClassVar[str] = "texts"
    model_folder: ClassVar[str] = "encoder_model"
    validation: ClassVar[None] = None

    @classmethod
    def from_options(cls, options: PretrainOptions) -> PretrainSpec:
        """Read and check the flags of pre-training.

        Args:
            options: the command's flags.

        Returns:
            The spec.

        Raises:
            UserError: flags out of range or that do not go together; no model at a path that is given.
        """
        check_pretrain_options(options)
        name = options.model_name_or_path
        if name is not None:
            check_model_folder(name, "--model_name_or_path")

        def place(path: str | None) -> str | None:
            return None if path is None else absolute_model_path(path)

        return cls(
            base_model=name,
            model=dict(
                model_name_or_path=place(name),
                config_name=place(options.config_name),
                tokenizer_name=place(options.tokenizer_name),
                method=options.pretrain_method,
                bow_loss_weight=options.bow_loss_weight,
                cache_dir=options.cache_dir,
                token=options.token,
                trust_remote_code=options.trust_remote_code,
                use_fast_tokenizer=options.use_fast_tokenizer,
            ),
            max_seq_length=options.max_seq_length,
            seed=data_seed_of(options),
            encoder_mlm_probability=options.encoder_mlm_probability,
            decoder_mlm_probability=options.decoder_mlm_probability,
        )

    @property
    def row_parser(self) -> Parse:
        """Parser of a text."""
        from raybge.data.groups import parse_passage

        return parse_passage

    def has_new_head(self) -> bool:
        """Return whether the language-modelling head is new, not that of an existing model."""
        name = self.base_model
        return name is None or not has_language_head(name, self.model["cache_dir"], self.model["token"])

    def describe(self) -> tuple[str, str]:
        """Return the plan's line on the model, and the text that follows the size of a step."""
        if self.base_model is None:
            model = f"from scratch, with the configuration of {self.model['config_name']}"
        elif self.has_new_head():
            model = (
                f"{self.base_model}, which has no language-modelling head: it gets a new one, tied to its embeddings"
            )
        else:
            model = self.base_model
        method = "RetroMAE" if self.model["method"] == "retromae" else "DupMAE"
        return (
            f"model: {model}; texts up to {self.max_seq_length} tokens",
            f"; {method}, {self.encoder_mlm_probability:.0%} of the words masked for the encoder, "
            f"{self.decoder_mlm_probability:.0%} for each position of the decoder",
        )

    def task(self, survey: Survey, data_sets: DataSets) -> PretrainTask:
        """Return the task on these rows; a new head gets a sample of them to count words in."""
        from raybge.data.text_sample import sample_texts
        from raybge.training.tasks.pretraining import PretrainTask

        longest = CHARACTERS_A_TOKEN * self.max_seq_length
        return PretrainTask(self, sample_texts(survey, self.row_parser, longest) if self.has_new_head() else ())
