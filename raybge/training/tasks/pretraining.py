"""What `raybge.pretrain` trains: an encoder with RetroMAE's decoder, fed with texts.

`PreTraining` is made in the driver; its `learner` is made of it in each worker, where torch is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from raybge.cli.options import PretrainOptions
from raybge.training.tasks.finetuning import absolute
from raybge.training.worker_config import seed_of
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from raybge.data.jsonl import Parse
    from raybge.data.source_files import SourceFile
    from raybge.data.survey import Survey
    from raybge.training.tasks.task import Learner

SHORTEST = 3  # tokens: those around a text, and one to be asked for
CHARACTERS_A_TOKEN = 8  # that are kept of a text of which tokens are counted: most have fewer


@dataclass(frozen=True)
class PreTraining:
    """`model` are arguments of load_pretraining_model, `masks` those of TextMasker that are not the tokenizer.

    `texts`: some of the data, of which a new language model's head has what words to expect; none where it is not new.
    """

    model: dict[str, Any]
    masks: dict[str, Any]
    texts: Sequence[str] = field(default=(), repr=False)

    command: ClassVar[str] = "pretrain"
    rows: ClassVar[str] = "texts"
    folder: ClassVar[str] = "encoder_model"  # of the output folder, where the model goes

    @staticmethod
    def check(arguments: PretrainOptions) -> None:
        """UserError for what is wrong with the flags of pre-training."""
        from raybge.model.folder import check_model_folder

        if arguments.model_name_or_path is not None:
            check_model_folder(arguments.model_name_or_path, "--model_name_or_path")
        elif arguments.config_name is None or arguments.tokenizer_name is None:
            raise UserError(
                "missing: --model_name_or_path, or --config_name and --tokenizer_name to start from scratch"
            )
        if arguments.max_seq_length < SHORTEST:
            raise UserError(f"--max_seq_length must be at least {SHORTEST}, found {arguments.max_seq_length}")
        for name in ("encoder_mlm_probability", "decoder_mlm_probability"):
            if not 0 < getattr(arguments, name) < 1:
                raise UserError(f"--{name} must be above 0 and below 1, found {getattr(arguments, name)}")
        for name in ("eval_strategy", "do_eval", "eval_on_start"):
            if arguments.training.get(name) not in (None, False, "no"):
                raise UserError(f"--{name}: a pre-trained encoder is measured once it is fine-tuned")
        if arguments.bow_loss_weight <= 0:
            raise UserError(f"--bow_loss_weight must be above 0, found {arguments.bow_loss_weight}")

    @staticmethod
    def parse(arguments: PretrainOptions) -> Parse:
        """What a row must be."""
        from raybge.data.groups import parse_passage

        return parse_passage

    @staticmethod
    def inputs(arguments: PretrainOptions, files: Sequence[SourceFile]) -> dict[str, list[str | None]]:
        """What every worker reads, by flag."""
        models = {f"--{n}": [getattr(arguments, n)] for n in ("model_name_or_path", "config_name", "tokenizer_name")}
        return {"--train_data": [file.path for file in files], **models}

    @staticmethod
    def describe(arguments: PretrainOptions) -> tuple[str, str]:
        """The plan's line on the model, and what it says behind the size of a step."""
        name = arguments.model_name_or_path
        if name is None:
            model = f"from scratch, as {arguments.config_name} says"
        elif not _has_new_head(arguments):
            model = name
        else:
            model = f"{name}, which has no language-modelling head: it gets a fresh one, tied to its embeddings"
        method = "RetroMAE" if arguments.pretrain_method == "retromae" else "DupMAE"
        hidden = f"{arguments.encoder_mlm_probability:.0%} of the words hidden from the encoder"
        return (
            f"model: {model}; texts up to {arguments.max_seq_length} tokens",
            f"; {method}, {hidden}, {arguments.decoder_mlm_probability:.0%} from each position of the decoder",
        )

    @classmethod
    def of(cls, arguments: PretrainOptions, survey: Survey) -> PreTraining:
        """What the flags say."""
        from raybge.data.text_sample import sample_texts

        def place(name: str | None) -> str | None:
            return None if name is None else absolute(name)

        longest = CHARACTERS_A_TOKEN * arguments.max_seq_length
        texts = sample_texts(survey, cls.parse(arguments), longest) if _has_new_head(arguments) else ()
        return cls(
            model=dict(
                model_name_or_path=place(arguments.model_name_or_path),
                config_name=place(arguments.config_name),
                tokenizer_name=place(arguments.tokenizer_name),
                method=arguments.pretrain_method,
                bow_loss_weight=arguments.bow_loss_weight,
                cache_dir=arguments.cache_dir,
                token=arguments.token,
                trust_remote_code=arguments.trust_remote_code,
                use_fast_tokenizer=arguments.use_fast_tokenizer,
            ),
            masks=dict(
                max_seq_length=arguments.max_seq_length,
                seed=seed_of(arguments),
                encoder_mlm_probability=arguments.encoder_mlm_probability,
                decoder_mlm_probability=arguments.decoder_mlm_probability,
            ),
            texts=texts,
        )

    def learner(self, args: Any) -> Learner:
        """Load the model onto the device of `args`, the worker's TrainingArguments."""
        from raybge.data.masking import TextMasker
        from raybge.losses.retromae_model import PretrainedEncoder, load_pretraining_model
        from raybge.model.embedding import max_positions
        from raybge.training.tasks.task import Learner

        model, tokenizer, fresh_head = load_pretraining_model(**self.model)
        backbone: Any = model.embedding.backbone
        length = min(self.masks["max_seq_length"], max_positions(backbone) or self.masks["max_seq_length"])
        masker = TextMasker(tokenizer, **{**self.masks, "max_seq_length": length})
        if fresh_head:
            model.expect(masker.count(self.texts, model.vocabulary))
        model.to(args.device).prepare_for_training()
        return Learner(model, backbone, masker, PretrainedEncoder(model, tokenizer, length))

    def save(self, learner: Learner, folder: Path, weights: Mapping[str, Tensor] | None) -> None:
        """Write the encoder; the decoder stays in the checkpoints."""
        learner.encoder.save_encoder(folder, weights)


def _has_new_head(arguments: PretrainOptions) -> bool:
    """Whether the language model's head is not of a model that is there."""
    from raybge.model.folder import has_language_head

    name = arguments.model_name_or_path
    return name is None or not has_language_head(name, arguments.cache_dir, arguments.token)
