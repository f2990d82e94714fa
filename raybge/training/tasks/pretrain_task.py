"""Pre-training of an encoder on texts with RetroMAE's decoder: the part that runs in workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from raybge.training.tasks.pretrain_spec import PretrainSpec
    from raybge.training.tasks.task import TaskComponents


@dataclass(frozen=True)
class PretrainTask:
    """Pre-training on the rows of a run.

    Args:
        spec: the flags of pre-training.
        texts: sample of the data, whose word counts start a new language-modeling head; empty if the head is not new.
    """

    spec: PretrainSpec
    texts: Sequence[str] = field(default=(), repr=False)

    def build(self, args: Any) -> TaskComponents:
        """Load the model onto the device of `args`, the worker's TrainingArguments."""
        from raybge.data.masking import TextMasker
        from raybge.losses.retromae_loading import PretrainedEncoder, load_pretraining_model
        from raybge.model.embedding import max_positions
        from raybge.training.tasks.task import TaskComponents

        spec = self.spec
        model, tokenizer, fresh_head = load_pretraining_model(**spec.model)
        backbone: Any = model.embedding.backbone
        length = min(spec.max_seq_length, max_positions(backbone) or spec.max_seq_length)
        masker = TextMasker(
            tokenizer,
            max_seq_length=length,
            seed=spec.seed,
            encoder_mlm_probability=spec.encoder_mlm_probability,
            decoder_mlm_probability=spec.decoder_mlm_probability,
        )
        if fresh_head:
            model.init_output_bias(masker.count(self.texts, model.vocabulary))
        model.to(args.device).prepare_for_training()
        return TaskComponents(model, backbone, masker, PretrainedEncoder(model, tokenizer, length))

    def save(self, components: TaskComponents, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
        """Write the encoder; the decoder stays in the checkpoints.

        Args:
            components: the trained model.
            folder: folder of the encoder.
            weights: the whole weights if those in memory are shards.
        """
        components.encoder.save_encoder(folder, weights)
