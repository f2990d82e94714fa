"""Spec of pre-training: read from the flags and checked before anything loads.

Importing this module imports no torch: the driver makes a spec, the workers build the model from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from raybge.cli.options import PretrainOptions
from raybge.model.folder import has_language_head
from raybge.model.folder_checks import check_model_folder
from raybge.model.spec import absolute_model_path
from raybge.training.spec import data_seed_of
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.data.datasets import DataSets
    from raybge.data.jsonl import Parse
    from raybge.data.survey import Survey
    from raybge.training.tasks.pretrain_task import PretrainTask

CHARACTERS_PER_TOKEN = 8  # read of a text whose tokens are counted: most tokens have fewer
SHORTEST_TEXT = 3  # tokens: the special ones around a text, and one to predict


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
        allow_unknown_tokens: words of the data may be unknown to the tokenizer.
    """

    base_model: str | None
    model: dict[str, Any]
    max_seq_length: int
    seed: int
    encoder_mlm_probability: float
    decoder_mlm_probability: float
    allow_unknown_tokens: bool = False

    command: ClassVar[str] = "pretrain"
    row_noun: ClassVar[str] = "text"
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
        _check_pretrain_options(options)
        name = options.model_name_or_path
        if name is not None:
            check_model_folder(name, "--model_name_or_path", options.tokenizer_name)

        def absolute(path: str | None) -> str | None:
            return None if path is None else absolute_model_path(path)

        return cls(
            base_model=name,
            model=dict(
                model_name_or_path=absolute(name),
                config_name=absolute(options.config_name),
                tokenizer_name=absolute(options.tokenizer_name),
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
            allow_unknown_tokens=options.allow_unknown_tokens,
        )

    @property
    def trained_lengths(self) -> dict[str, int]:
        """Most tokens of a text."""
        return {"texts": self.max_seq_length}

    @property
    def row_parser(self) -> Parse:
        """Parser of a text."""
        from raybge.data.groups import parse_passage

        return parse_passage

    def has_new_head(self) -> bool:
        """Return whether the language-modeling head is new, not that of an existing model."""
        name = self.base_model
        return name is None or not has_language_head(name, self.model["cache_dir"], self.model["token"])

    def describe(self) -> tuple[str, str]:
        """Return the plan's line on the model, and the text that follows the size of a step."""
        if self.base_model is None:
            model = f"from scratch, with the configuration of {self.model['config_name']}"
        elif self.has_new_head():
            model = f"{self.base_model}, which has no language-modeling head: it gets a new one, tied to its embeddings"
        else:
            model = self.base_model
        method = "RetroMAE" if self.model["method"] == "retromae" else "DupMAE"
        return (
            f"model: {model}; texts up to {self.max_seq_length} tokens",
            f"; {method}, {self.encoder_mlm_probability:.0%} of the words masked for the encoder, "
            f"{self.decoder_mlm_probability:.0%} for each position of the decoder",
        )

    def check_model(self, survey: Survey) -> None:
        """Check model and tokenizer on a sample of the rows."""
        from raybge.model.folder import FolderSettings
        from raybge.model.preflight import check_model, word_sample

        names = ("config_name", "tokenizer_name", "cache_dir", "token", "trust_remote_code", "use_fast_tokenizer")
        check_model(
            self.model["model_name_or_path"] or self.model["config_name"],
            None if self.allow_unknown_tokens else partial(word_sample, survey, self.row_parser),
            settings=FolderSettings() if self.base_model is None else None,
            **{name: self.model[name] for name in names},
        )

    def row_notes(self, survey: Survey) -> list[str]:
        """Return no line: every text is used as it is."""
        return []

    def task(self, survey: Survey, data_sets: DataSets) -> PretrainTask:
        """Return the task on these rows; a new head gets a sample of them to count words in."""
        from raybge.data.text_sample import sample_texts
        from raybge.training.tasks.pretrain_task import PretrainTask

        longest = CHARACTERS_PER_TOKEN * self.max_seq_length
        return PretrainTask(self, sample_texts(survey, self.row_parser, longest) if self.has_new_head() else ())


def _check_pretrain_options(options: PretrainOptions) -> None:
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
