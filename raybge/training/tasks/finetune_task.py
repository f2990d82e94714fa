"""Fine-tuning of an embedding model on groups with a contrastive objective: the part that runs in workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raybge.util.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raybge.data.collate import GroupTokenizer
    from raybge.data.tokenize import TextTokenizer
    from raybge.model.encoder import Encoder
    from raybge.training.tasks.finetune_spec import FinetuneSpec
    from raybge.training.tasks.task import TaskComponents

MEMORY_MESSAGE = "the GPU's memory ran out before the first step: give --use_lora True, or a smaller model"


def _autocast_dtype(args: Any) -> torch.dtype | None:
    """Return the precision of the autocast of a run, None for fp32."""
    import torch

    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


@dataclass(frozen=True)
class FinetuneTask:
    """Fine-tuning on the rows of a run.

    Args:
        spec: the flags of fine-tuning.
        alone: numbers of the files whose queries have negatives from their own group only.
    """

    spec: FinetuneSpec
    alone: frozenset[int] = frozenset()

    def build(self, args: Any) -> TaskComponents:
        """Load the model and make its tokenizer.

        Args:
            args: the worker's TrainingArguments, which name the device; `torch_compile` is turned off once the network
                is compiled.

        Returns:
            The components.

        Raises:
            UserError: a Matryoshka dimension above the model's width, or a GPU's memory is too small for the model.
        """
        import torch

        from raybge.losses.contrastive_model import ContrastiveModel
        from raybge.model.packing import CHECKED_SUB_BATCH, prepare_for_inference, prepare_for_training
        from raybge.training.tasks.task import TaskComponents

        spec = self.spec
        messages: list[str] = []
        encoder = spec.encoder.load(devices=str(args.device))
        if spec.fix_position_embedding:
            encoder.model.freeze_positions()
        if args.torch_compile:
            # Only the network is compiled: around it are ragged lists, at which a compiler would break its graph.
            backend, mode = args.torch_compile_backend, args.torch_compile_mode
            encoder.model.backbone.compile(backend=backend, mode=mode, dynamic=True)
            args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        else:
            if args.activation_checkpointing:  # before the Trainer does it: packed texts are checked with it
                options = dict(args.activation_checkpointing_kwargs or {})
                layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
                encoder.model.backbone.activation_checkpointing_enable(options or None, layers, offload)
            try:
                # for the check it matters that chunks are recomputed, not how large they are
                texts = CHECKED_SUB_BATCH if spec.sub_batch_tokens else spec.sub_batch_size
                failure = prepare_for_training(encoder.model, _autocast_dtype(args), texts)
            except torch.OutOfMemoryError as error:
                raise UserError(f"{MEMORY_MESSAGE} ({first_line(error)})") from error
            if failure:
                messages.append(f"texts are padded, not packed: {failure}")
        dims = spec.objective.mrl_dims
        if dims and max(dims) > encoder.dim:
            raise UserError(f"--mrl_dims must be at most {encoder.dim}, the model's width, found {max(dims)}")
        guide = spec.guide.load(devices=str(args.device)) if spec.guide else None
        if guide and (failure := prepare_for_inference(guide.model, _autocast_dtype(args))):
            messages.append(f"texts of the guide model are padded, not packed: {failure}")
        model = ContrastiveModel(
            encoder.model,
            spec.objective.objective(encoder.model.normalize),
            spec.pad_to_multiple_of,
            spec.sub_batch_size,
            guide.model if guide else None,
            spec.sub_batch_tokens,
        )
        return TaskComponents(model, encoder.model.backbone, self._tokenizer(encoder, guide), encoder, tuple(messages))

    def _tokenizer(self, encoder: Encoder, guide: Encoder | None) -> GroupTokenizer:
        from raybge.data.collate import GroupTokenizer

        return GroupTokenizer(
            self._text_tokenizer(encoder),
            group_size=self.spec.group_size,
            seed=self.spec.seed,
            shuffle_ratio=self.spec.shuffle_ratio,
            alone=self.alone,
            scored=self.spec.scored,
            guide=self._text_tokenizer(guide) if guide else None,
        )

    def _text_tokenizer(self, encoder: Encoder) -> TextTokenizer:
        """Return the encoder's tokenizer with the lengths of the flags, at most as many tokens as the model holds."""
        from raybge.data.tokenize import TextTokenizer
        from raybge.model.embedding import max_positions

        lengths = self.spec.query_max_len, self.spec.passage_max_len
        limit = max_positions(encoder.model.backbone) or max(lengths)
        query_max_len, passage_max_len = (min(length, limit) for length in lengths)
        return TextTokenizer(encoder.tokenizer, encoder.instructions, query_max_len, passage_max_len)

    def save(self, components: TaskComponents, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
        """Write the trained model; `weights` are the whole ones if those in memory are shards."""
        components.encoder.save(folder, weights, self.spec.merge_adapters)
