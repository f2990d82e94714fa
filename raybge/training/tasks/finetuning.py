"""What `raybge.train` trains: an embedding model with a contrastive objective, fed with groups.

`FineTuning` is made in the driver; its `learner` is made of it in each worker, where torch is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from raybge.cli.options import TrainOptions
from raybge.training.spec import check_recipe, inputs_of, lora_of, objective_of, sub_batch_size_of
from raybge.training.worker_config import data_sets_of, device_batch_of, seed_of
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from raybge.data.jsonl import Parse
    from raybge.data.source_files import SourceFile
    from raybge.data.survey import Survey
    from raybge.data.tokenize import TextTokenizer
    from raybge.losses.objective import Objective
    from raybge.model.encoder import Encoder
    from raybge.training.tasks.task import Learner


@dataclass(frozen=True)
class FineTuning:
    """`encoder` are Encoder's arguments, `guide` those of the guide model's; `lengths` and `draws` are those of
    TextTokenizer and GroupTokenizer that are not the encoder's.
    """

    encoder: dict[str, Any]
    lengths: dict[str, int]
    draws: dict[str, Any]
    objective: Objective
    fix_position_embedding: bool = False
    merge_adapters: bool = False
    pad_to_multiple_of: int | None = None
    sub_batch_size: int | None = None
    guide: dict[str, Any] | None = None

    command: ClassVar[str] = "train"
    rows: ClassVar[str] = "groups"
    folder: ClassVar[str] = ""  # of the output folder, where the model goes

    @staticmethod
    def check(arguments: TrainOptions) -> None:
        """UserError for what is wrong with the flags of the recipe."""
        check_recipe(arguments)

    @staticmethod
    def parse(arguments: TrainOptions) -> Parse:
        """What a row must be."""
        from raybge.data.groups import parse_group, parse_scored_group

        return parse_scored_group if arguments.knowledge_distillation else parse_group

    @staticmethod
    def inputs(arguments: TrainOptions, files: Sequence[SourceFile]) -> dict[str, list[str | None]]:
        """What every worker reads, by flag."""
        return inputs_of(arguments, files)

    @staticmethod
    def describe(arguments: TrainOptions) -> tuple[str, str]:
        """The plan's line on the model, and what it says behind the size of a step."""
        from raybge.model.folder import read_settings

        settings = read_settings(arguments.model_name_or_path, arguments.cache_dir, arguments.token)
        pooling = arguments.pooling_method or settings.pooling
        normalize = settings.normalize if arguments.normalize_embeddings is None else arguments.normalize_embeddings
        says = "the model's folder" if settings.source == "modules.json" else "defaults: the folder does not say"
        negatives = (
            "all groups of a step"
            if arguments.negatives_cross_device
            else f"blocks of {device_batch_of(arguments)} groups"
        )
        return (
            f"model: {arguments.model_name_or_path}, {pooling} pooling, {'' if normalize else 'not '}normalised "
            f"({says}), query {arguments.query_max_len} / passage {arguments.passage_max_len} tokens",
            f" of {arguments.train_group_size}; "
            f"negatives from {negatives if arguments.use_inbatch_neg else 'the own group'}",
        )

    @classmethod
    def of(cls, arguments: TrainOptions, survey: Survey) -> FineTuning:
        """What the flags say of training on these rows."""
        return cls(
            encoder=dict(
                model_name_or_path=absolute(arguments.model_name_or_path),
                normalize_embeddings=arguments.normalize_embeddings,
                pooling_method=arguments.pooling_method,
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
            fix_position_embedding=arguments.fix_position_embedding,
            merge_adapters=arguments.save_merged_lora_model,
            pad_to_multiple_of=arguments.pad_to_multiple_of,
        )

    def learner(self, args: Any) -> Learner:
        """Load the model onto the device of `args`, the worker's TrainingArguments."""
        from raybge.data.collate import GroupTokenizer
        from raybge.losses.contrastive_model import ContrastiveModel
        from raybge.model.encoder import Encoder
        from raybge.training.tasks.task import Learner

        encoder = Encoder(**self.encoder, use_fp16=False, devices=str(args.device))
        if self.fix_position_embedding:
            encoder.model.freeze_positions()
        if args.torch_compile:
            # The network alone: around it are ragged lists, which a compiler would only break its graph at.
            backend, mode = args.torch_compile_backend, args.torch_compile_mode
            encoder.model.backbone.compile(backend=backend, mode=mode, dynamic=True)
            args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        else:
            encoder.model.prepare_for_training()
        if self.objective.mrl_dims and max(self.objective.mrl_dims) > encoder.dim:
            raise UserError(f"--mrl_dims must be at most {encoder.dim}, the model's width")
        guide = Encoder(**self.guide, use_fp16=False, devices=str(args.device)) if self.guide else None
        model = ContrastiveModel(
            encoder.model,
            self.objective,
            self.pad_to_multiple_of,
            self.sub_batch_size,
            guide.model if guide else None,
        )
        tokenizer = GroupTokenizer(self._texts(encoder), **self.draws, guide=self._texts(guide) if guide else None)
        return Learner(model, encoder.model.backbone, tokenizer, encoder)

    def _texts(self, encoder: Encoder) -> TextTokenizer:
        """With the lengths, where they are more than the model can hold, cut to that."""
        from raybge.data.tokenize import TextTokenizer
        from raybge.model.embedding import max_positions

        room = max_positions(encoder.model.backbone)
        lengths = {name: min(value, room) if room else value for name, value in self.lengths.items()}
        return TextTokenizer(encoder.tokenizer, encoder.instructions, **lengths)

    def save(self, learner: Learner, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
        """Write the trained model; `weights` where those in memory are shards."""
        learner.encoder.save(folder, weights, self.merge_adapters)


def absolute(model: str) -> str:
    """A local folder's absolute path: a worker's current folder is Ray's. A hub's name as it is."""
    return os.path.abspath(model) if os.path.exists(model) else model


def _guide(arguments: TrainOptions) -> dict[str, Any] | None:
    """Encoder's arguments for the guide model."""
    if arguments.guide_model is None:
        return None
    return dict(
        model_name_or_path=absolute(arguments.guide_model),
        trust_remote_code=arguments.trust_remote_code,
        cache_dir=arguments.cache_dir,
        token=arguments.token,
    )
