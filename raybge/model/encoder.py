"""Turning texts into vectors: the model with its tokenizer and instructions, loaded, run and saved.

    from raybge.model.encoder import Encoder
    encoder = Encoder("BAAI/bge-small-en-v1.5")
    scores_QN = encoder.similarity(encoder.encode_queries(["what is a lane?"]), encoder.encode_corpus(["..."]))

Letters in tensor names: N, M texts, D width of a vector.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
import transformers
from torch import Tensor

from raybge.data.prompts import Instructions
from raybge.data.tokenize import token_ids
from raybge.model.embedding import EmbeddingModel, max_positions
from raybge.model.folder import FolderSettings, check_model_folder, read_settings, remove_weights
from raybge.model.inference import Devices, embed_texts, pick_devices
from raybge.model.loading import ModelLocation, load_backbone, load_tokenizer, save_tokenizer_and_settings
from raybge.model.lora import Lora, load_adapters, merged_weights
from raybge.model.quantization import Precision, quantize_embeddings
from raybge.util.errors import UserError

__all__ = ["EmbeddingModel", "Encoder", "FolderSettings", "check_model_folder", "read_settings"]

# On a CPU a chunk of about this many tokens stays in the caches; larger ones are slower.
CPU_TOKENS_PER_CHUNK = 2048
_FALLBACK_MAX_LENGTH = 512  # the recipe's default, where neither flag nor folder nor model sets a length
_TOKENIZED_AT_ONCE = 8192  # texts: their ids are Python's numbers for so long, which take ten times the room


class OutputOptions(TypedDict, total=False):
    """What the encode methods make of the vectors, by keyword; left out, each is as the model gives it, in fp32.

    truncate_dim: as in the constructor, for this call.
    precision, ranges, calibration_embeddings: as in `quantize_embeddings`.
    show_progress_bar: None shows one on a terminal when the work takes long.
    """

    truncate_dim: int | None
    precision: Precision
    ranges: np.ndarray | None
    calibration_embeddings: np.ndarray | None
    show_progress_bar: bool | None


class Encoder:
    """An embedding model with its tokenizer, on one device or several. Called as FlagEmbedding's FlagModel is.

    An argument left None is what the model's folder says: pooling, normalising, prompts, maximal length;
    where it says nothing: an encoder's first token or a decoder's last, normalised, no prompt, what the model can
    hold. Half precision is on for a GPU and never on a CPU, where it would round the weights and gain nothing.

    Args:
        model_name_or_path: a local folder, or a model's name on the hub.
        query_instruction_for_retrieval, passage_instruction_for_retrieval: "" turns the folder's prompt off.
        query_instruction_format, passage_instruction_format: two {}, for the instruction and the text.
        devices: such as "cuda:1", 1 or "cpu"; None takes the GPU if there is one. Of several, such as
            ["cuda:0", "cuda:1"], each has a copy of the model and shares in every call.
        batch_size: texts of full length that a chunk may hold; of shorter ones it holds more. On a CPU a
            chunk is never above what is fast there.
        query_max_length, passage_max_length: in tokens, special ones included; at most what the model holds.
        truncate_dim: the first so many numbers of each vector alone, brought to length 1 again where the model
            normalises: for models trained with `--use_mrl`.
        lora: train adapters instead of the weights. Without it a folder of adapters is opened as the whole model that
            they make of their base; with it they are trained further.

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
        devices: Devices = None,
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
        truncate_dim: int | None = None,
        lora: Lora | None = None,
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
        self._devices = pick_devices(devices)
        self.device = self._devices[0]
        self._on_cpu = any(device.type == "cpu" for device in self._devices)
        self.use_fp16 = not self._on_cpu and use_fp16 is not False
        self._source = ModelLocation(model_name_or_path, self.settings, config_name, cache_dir, token, trust_remote_code)
        self.lora = lora
        backbone = load_backbone(self._source, torch.float16 if self.use_fp16 else torch.float32, lora)
        self._weights = frozenset(backbone.state_dict())
        self.tokenizer = load_tokenizer(self._source, tokenizer_name, use_fast_tokenizer)
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
        self.truncate_dim = self._width(truncate_dim) if truncate_dim is not None else None
        self._copy_to_devices()

    def _copy_to_devices(self) -> None:
        """Copies of the model as it is now, on all devices but the first."""
        self._copies = [copy.deepcopy(self.model).to(device) for device in self._devices[1:]]

    @property
    def dim(self) -> int:
        """Width D of a vector as the model gives it, before `truncate_dim`."""
        return self.model.dim

    def _width(self, wanted: int | None) -> int:
        """Width of the vectors wanted: the call's, else the constructor's, else the model's."""
        width = self.dim if wanted is None else wanted
        if not 1 <= width <= self.dim:
            raise UserError(f"truncate_dim must be from 1 to {self.dim}, this model's width; found {width}")
        return width

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
        return token_ids(self.tokenizer, list(texts), max_length)

    def encode(
        self,
        sentences: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        **output: Unpack[OutputOptions],
    ) -> np.ndarray | Tensor:
        """Vectors of texts as they are (only a default prompt that the folder names is put in front).

        Args:
            sentences: N texts, or one.
            batch_size, convert_to_numpy: as in the constructor, for this call.
            max_length: in tokens; None takes the passages'.
            output: `truncate_dim`, `precision`, `ranges`, `calibration_embeddings`, `show_progress_bar`; see `OutputOptions`.

        Returns:
            (N, D) fp32, numpy or a torch tensor on the CPU; (D,) for one text given as a str. Where asked for, D is
            less and the numbers are bytes.
        """
        prefix = self.settings.prompts.get(self.settings.default_prompt_name or "", "")
        return self._encode(
            sentences,
            lambda text: prefix + text,
            self.passage_max_length if max_length is None else max_length,
            batch_size,
            convert_to_numpy,
            output,
        )

    def encode_queries(
        self,
        queries: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        **output: Unpack[OutputOptions],
    ) -> np.ndarray | Tensor:
        """As `encode`, with the queries' instruction and maximal length."""
        return self._encode(
            queries,
            self.query_text,
            self.query_max_length if max_length is None else max_length,
            batch_size,
            convert_to_numpy,
            output,
        )

    def encode_corpus(
        self,
        corpus: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        **output: Unpack[OutputOptions],
    ) -> np.ndarray | Tensor:
        """As `encode`, with the passages' instruction and maximal length."""
        return self._encode(
            corpus,
            self.passage_text,
            self.passage_max_length if max_length is None else max_length,
            batch_size,
            convert_to_numpy,
            output,
        )

    def _encode(
        self,
        texts: str | Sequence[str],
        instructed: Callable[[str], str],
        max_length: int,
        batch_size: int | None,
        as_numpy: bool | None,
        output: OutputOptions,
    ) -> np.ndarray | Tensor:
        given = [texts] if isinstance(texts, str) else texts
        if unknown := output.keys() - OutputOptions.__annotations__.keys():
            raise TypeError(f"encoding takes no argument {', '.join(sorted(unknown))}")
        width = output.get("truncate_dim")
        width = self._width(self.truncate_dim if width is None else width)
        max_length = self._limit(max_length)
        token_ids = [
            np.array(ids, np.int32)
            for start in range(0, len(given), _TOKENIZED_AT_ONCE)
            for ids in self.tokenize(
                [instructed(text) for text in given[start : start + _TOKENIZED_AT_ONCE]], max_length
            )
        ]
        budget = (batch_size or self.batch_size) * max_length
        budget = min(budget, CPU_TOKENS_PER_CHUNK) if self._on_cpu else budget
        e_ND = embed_texts([self.model, *self._copies], token_ids, width, budget, output.get("show_progress_bar"))
        result = e_ND[0] if isinstance(texts, str) else e_ND
        precision = output.get("precision", "float32")
        if precision != "float32":
            ranges = output.get("ranges"), output.get("calibration_embeddings")
            result = torch.from_numpy(quantize_embeddings(result, precision, *ranges))
        return result.numpy() if (self.convert_to_numpy if as_numpy is None else as_numpy) else result

    def similarity(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Inner products of vectors with each other: their cosines where the model normalises.

        Of a model that does not, longer vectors score higher; `normalize_embeddings=True` in the constructor makes them
        cosines.

        Args:
            a, b: (N, D) and (M, D), or (D,) for one, both numpy or both tensors; floats, since inner products of
                quantised vectors are not those of the vectors.

        Returns:
            (N, M), of the kind that was given.
        """
        for vectors in (a, b):
            if not (vectors.is_floating_point() if isinstance(vectors, Tensor) else vectors.dtype.kind == "f"):
                raise UserError(
                    f"similarity is of vectors in floats, found {vectors.dtype}: compare them before quantising"
                )
        a_ND, b_MD = (vectors[None] if vectors.ndim == 1 else vectors for vectors in (a, b))
        return a_ND @ b_MD.T

    def save(
        self, path: str | Path, state_dict: Mapping[str, Tensor] | None = None, merge_adapters: bool = False
    ) -> None:
        """Write the model as a sentence-transformers folder, which transformers and FlagEmbedding open too.

        The maximal length it carries is the larger of the queries' and the passages'; its prompts are the
        instructions in use. The model card is the caller's.

        Args:
            path: the folder; a model that is there is replaced.
            state_dict: the weights to write, named as in a `ContrastiveModel`, where those in memory are not whole
                (sharded over workers) or not under their names (compiled). None: those in memory.
            merge_adapters: with `lora`, write the whole model that base and adapters amount to, not the adapters.

        Raises UserError for an instruction format that puts something behind the text: such a folder can only say
        what comes before it.
        """
        settings = dataclasses.replace(
            self.settings,
            pooling=self.model.pooling,
            normalize=self.model.normalize,
            prompts={**self.settings.prompts, **self.instructions.prefixes()},
            max_length=max(self.query_max_length, self.passage_max_length),
        )
        own = None if state_dict is None else self._own(state_dict)
        folder = Path(path)
        remove_weights(folder)
        if merge_adapters and self.lora:
            self._save_whole(folder, own)
        else:
            self._backbone.save_pretrained(folder, state_dict=own)
        save_tokenizer_and_settings(folder, self.tokenizer, settings, self.dim)

    def _save_whole(self, folder: Path, own: Mapping[str, Tensor] | None) -> None:
        """Write the plain model that base and adapters amount to, without making it."""
        backbone = self._backbone
        weights = merged_weights(backbone, backbone.state_dict() if own is None else own)
        with torch.device("meta"):
            shell = transformers.AutoModel.from_config(
                copy.deepcopy(backbone.config),
                dtype=backbone.dtype,
                trust_remote_code=self._source.trust_remote_code,
            )
        shell.save_pretrained(folder, state_dict=weights)

    def load_weights(self, path: str | Path) -> None:
        """Copy the weights of a folder that `save` wrote into the model in memory, in place; adapters into adapters.

        Raises UserError for a folder whose weights are not exactly this model's.
        """
        check_model_folder(str(path), "the checkpoint")
        settings = read_settings(str(path))
        if (settings.base is None) != (self.lora is None):
            kind = "a whole model" if settings.base is None else "adapters"
            raise UserError(f"the checkpoint {path} holds {kind}: expected what --use_lora, or its absence, makes")
        if self.lora:
            load_adapters(self._backbone, str(path), {})
            self._copy_to_devices()
            return
        # through transformers: some models have other names for their weights in a file than in memory
        source = ModelLocation(str(path), settings, trust_remote_code=self._source.trust_remote_code)
        weights = load_backbone(source, self._backbone.dtype).state_dict()
        try:
            self._backbone.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise UserError(f"the checkpoint {path} holds another model than this: {error}") from error
        self._copy_to_devices()

    @property
    def _backbone(self) -> Any:
        return self.model.backbone

    def _own(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The transformers model's part of a ContrastiveModel's state_dict."""
        own = {}
        for name, tensor in state_dict.items():
            # what torch.compile puts in between
            _, mark, rest = name.replace("_orig_mod.", "").partition("embedding.backbone.")
            if mark:
                own[rest] = tensor
        if own.keys() != self._weights:
            differ = sorted(own.keys() ^ self._weights)
            raise ValueError(f"not the weights of this model: {', '.join(differ[:5])} ({len(differ)} in all)")
        return own
