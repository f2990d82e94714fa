"""Turning texts into vectors: the model with its tokenizer and instructions, loaded, run and saved.

    from raybge.model.encoder import Encoder
    encoder = Encoder("BAAI/bge-small-en-v1.5")
    scores_QN = encoder.encode_queries(["what is a lane?"]) @ encoder.encode_corpus(["..."]).T

Letters in tensor names: N texts, D width of a vector.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from raybge.errors import UserError
from raybge.model.embedding import EmbeddingModel, max_positions, plan_chunks
from raybge.model.folder import (
    FolderSettings,
    Instructions,
    check_model_folder,
    read_settings,
    write_settings,
)

__all__ = ["EmbeddingModel", "Encoder", "FolderSettings", "check_model_folder", "read_settings"]

# On a CPU a chunk of about this many tokens stays in the caches; larger ones are slower.
CPU_TOKENS_PER_CHUNK = 2048
_FALLBACK_MAX_LENGTH = 512  # the recipe's default, where neither flag nor folder nor model sets a length


class Encoder:
    """An embedding model with its tokenizer, on one device. Called as FlagEmbedding's FlagModel is.

    An argument left None is what the model's folder says: pooling, normalising, prompts, maximal length;
    where it says nothing: cls, normalised, no prompt, what the model can hold. Half precision is on for a GPU
    and never on a CPU, where it would round the weights and gain nothing.

    Args:
        model_name_or_path: a local folder, or a model's name on the hub.
        query_instruction_for_retrieval, passage_instruction_for_retrieval: "" turns the folder's prompt off.
        query_instruction_format, passage_instruction_format: two {}, for the instruction and the text.
        devices: one device, such as "cuda:1", 1 or "cpu"; None takes the GPU if there is one.
        batch_size: texts of full length that a chunk may hold; of shorter ones it holds more. On a CPU a
            chunk is never above what is fast there.
        query_max_length, passage_max_length: in tokens, special ones included; at most what the model holds.

    Raises:
        UserError: no model there, or one whose vectors raybge could not reproduce.
    """

    def __init__(
        self,
        model_name_or_path: str,
        normalize_embeddings: bool | None = None,
        use_fp16: bool | None = None,
        query_instruction_for_retrieval: str | None = None,
        query_instruction_format: str = "{}{}",
        passage_instruction_for_retrieval: str | None = None,
        passage_instruction_format: str = "{}{}",
        devices: str | int | Sequence[str | int] | None = None,
        pooling_method: str | None = None,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        batch_size: int = 256,
        query_max_length: int | None = None,
        passage_max_length: int | None = None,
        convert_to_numpy: bool = True,
        tokenizer_name: str | None = None,
        config_name: str | None = None,
        token: str | bool | None = None,
        use_fast_tokenizer: bool = True,
    ) -> None:
        check_model_folder(model_name_or_path, "--model_name_or_path")
        self.settings = read_settings(model_name_or_path, cache_dir, token)
        self.instructions = Instructions(
            query_instruction_for_retrieval,
            query_instruction_format,
            passage_instruction_for_retrieval,
            passage_instruction_format,
            self.settings.prompts,
        )
        self.device = _device(devices)
        self.use_fp16 = self.device.type != "cpu" and use_fp16 is not False
        hub = {"cache_dir": cache_dir, "token": token, "trust_remote_code": trust_remote_code}
        backbone = _load_backbone(
            model_name_or_path,
            config_name,
            self.settings.subfolder,
            torch.float16 if self.use_fp16 else torch.float32,
            hub,
        )
        self.tokenizer = _load_tokenizer(
            tokenizer_name or model_name_or_path,
            "" if tokenizer_name else self.settings.subfolder,
            {**hub, "use_fast": use_fast_tokenizer},
            self.settings.lower_case,
        )
        self.model = EmbeddingModel(
            backbone,
            pooling_method or self.settings.pooling,
            self.settings.normalize if normalize_embeddings is None else normalize_embeddings,
        ).to(self.device)
        self.model.eval()
        self.query_max_length = self._limit(query_max_length)
        self.passage_max_length = self._limit(passage_max_length)
        self.batch_size = batch_size
        self.convert_to_numpy = convert_to_numpy

    @property
    def dim(self) -> int:
        """Width D of a vector."""
        return self.model.dim

    def _limit(self, wanted: int | None) -> int:
        """The maximal length in tokens: as asked for, else the folder's, at most what the model holds."""
        if wanted is not None and wanted < 1:
            raise UserError(f"a maximal length must be at least 1 token, found {wanted}")
        room = max_positions(self.model.backbone)
        length = wanted or self.settings.max_length or room or _FALLBACK_MAX_LENGTH
        return length if room is None else min(length, room)

    def query_text(self, text: str, prompt: str | None = None) -> str:
        """The query with its instruction: a row's own `prompt`, else the constructor's, else the folder's."""
        return self.instructions.query_text(text, prompt)

    def passage_text(self, text: str) -> str:
        """The passage with its instruction: the constructor's, else the folder's."""
        return self.instructions.passage_text(text)

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of each text with its special tokens, cut to `max_length`; no padding."""
        if not texts:
            return []
        return self.tokenizer(
            list(texts),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]

    def encode(
        self,
        sentences: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
    ) -> np.ndarray | Tensor:
        """Vectors of texts as they are (only a default prompt that the folder names is put in front).

        Args:
            sentences: N texts, or one.
            batch_size, convert_to_numpy: as in the constructor, for this call.
            max_length: in tokens; None takes the passages'.

        Returns:
            (N, D) fp32, numpy or a torch tensor on the CPU; (D,) for one text given as a str.
        """
        prefix = self.settings.prompts.get(self.settings.default_prompt_name or "", "")
        return self._encode(
            sentences,
            lambda text: prefix + text,
            self.passage_max_length if max_length is None else max_length,
            batch_size,
            convert_to_numpy,
        )

    def encode_queries(
        self,
        queries: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
    ) -> np.ndarray | Tensor:
        """As `encode`, with the queries' instruction and maximal length."""
        return self._encode(
            queries,
            self.query_text,
            self.query_max_length if max_length is None else max_length,
            batch_size,
            convert_to_numpy,
        )

    def encode_corpus(
        self,
        corpus: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
    ) -> np.ndarray | Tensor:
        """As `encode`, with the passages' instruction and maximal length."""
        return self._encode(
            corpus,
            self.passage_text,
            self.passage_max_length if max_length is None else max_length,
            batch_size,
            convert_to_numpy,
        )

    def _encode(
        self,
        texts: str | Sequence[str],
        instructed: Any,
        max_length: int,
        batch_size: int | None,
        as_numpy: bool | None,
    ) -> np.ndarray | Tensor:
        one = isinstance(texts, str)
        max_length = self._limit(max_length)
        token_ids = self.tokenize([instructed(text) for text in ([texts] if one else texts)], max_length)
        budget = (batch_size or self.batch_size) * max_length
        if self.device.type == "cpu":
            budget = min(budget, CPU_TOKENS_PER_CHUNK)
        e_ND = torch.empty(len(token_ids), self.dim)
        with torch.no_grad(), _evaluating(self.model):
            for rows in plan_chunks([len(ids) for ids in token_ids], budget):
                # chunk by chunk to the host: all vectors together may not fit beside the model
                e_ND[rows] = self.model(*self.model.pad(token_ids, rows)).cpu()
        result = e_ND[0] if one else e_ND
        return result.numpy() if (self.convert_to_numpy if as_numpy is None else as_numpy) else result

    def save(self, path: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the model as a sentence-transformers folder, which transformers and FlagEmbedding open too.

        The maximal length it carries is the larger of the queries' and the passages'; its prompts are the
        instructions in use. The model card is the caller's. Raises UserError for an instruction format that
        puts something behind the text: such a folder can only say what comes before it.
        """
        settings = dataclasses.replace(
            self.settings,
            pooling=self.model.pooling,
            normalize=self.model.normalize,
            prompts={**self.settings.prompts, **self.instructions.prefixes()},
            max_length=max(self.query_max_length, self.passage_max_length),
        )
        backbone: Any = self.model.backbone
        own = {k.removeprefix("embedding.backbone."): v for k, v in (state_dict or {}).items()} or None
        backbone.save_pretrained(path, state_dict=own)
        mode = (Path(path) / "config.json").stat().st_mode
        for weights in Path(path).glob("*.safetensors"):
            weights.chmod(mode)  # safetensors writes files that only their owner can read
        # a fast tokenizer keeps the last call's truncation and would write it
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.model_max_length = settings.max_length
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        tokenizer.save_pretrained(path)
        versions = {"transformers": transformers.__version__, "pytorch": torch.__version__}
        write_settings(path, settings, self.dim, versions)

    def load_weights(self, path: str | Path) -> None:
        """Load the weights of a folder that `save` wrote, in place."""
        backbone: Any = self.model.backbone
        backbone.load_state_dict(type(backbone).from_pretrained(path).state_dict())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _device(devices: str | int | Sequence[str | int] | None) -> torch.device:
    if devices is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(devices, str | int):
        if len(devices) != 1:
            raise UserError(f"an Encoder holds one device, found {list(devices)}; the commands use all of them")
        devices = devices[0]
    return torch.device(f"cuda:{devices}" if isinstance(devices, int) else devices)


def _load_backbone(
    name: str, config_name: str | None, subfolder: str, dtype: torch.dtype, hub: dict[str, Any]
) -> nn.Module:
    """The transformers model, all weights from the file: a missing one would be random, without a word."""
    try:
        config = transformers.AutoConfig.from_pretrained(
            config_name or name, subfolder="" if config_name else subfolder, **hub
        )
        backbone, loading = transformers.AutoModel.from_pretrained(
            name, config=config, subfolder=subfolder, dtype=dtype, output_loading_info=True, **hub
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # gone, damaged, of another size
        raise UserError(f"the model {name} does not load: {_first_line(error)}") from error
    missing = {key for key in loading["missing_keys"] if not key.startswith("pooler.")}
    if missing:
        raise UserError(f"the model {name} lacks weights: {', '.join(sorted(missing)[:5])} ({len(missing)} in all)")
    if loading["missing_keys"]:
        backbone.pooler = None  # not in the file and used by nothing here: not saved with random weights either
    return backbone


def _load_tokenizer(name: str, subfolder: str, options: dict[str, Any], lower_case: bool) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, subfolder=subfolder, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of {name} does not load: {_first_line(error)}") from error
    if lower_case and not tokenizer.is_fast:
        raise UserError(f"the folder of {name} asks for lower case, which a slow tokenizer cannot be told")
    if lower_case:
        from tokenizers import normalizers

        own = tokenizer.backend_tokenizer.normalizer
        parts = [normalizers.Lowercase()] + ([] if own is None else [own])
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(parts)
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
