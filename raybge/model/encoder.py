"""Encoder: an embedding model with its tokenizer and instructions, loaded, run and saved.

    from raybge.model.encoder import Encoder
    encoder = Encoder("BAAI/bge-small-en-v1.5")
    scores_QN = encoder.similarity(encoder.encode_queries(["what is a lane?"]), encoder.encode_corpus(["..."]))

Letters in tensor names: N, M texts, Q queries, D width of a vector.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from raybge.data.prompts import Instructions
from raybge.data.tokenize import token_ids
from raybge.model.backends.choice import BackendChoice
from raybge.model.backends.opening import open_backbone
from raybge.model.embedding import EmbeddingModel, max_positions
from raybge.model.folder import FolderSettings, read_settings, remove_weights
from raybge.model.folder_checks import check_model_folder
from raybge.model.inference import Devices, embed_texts, pick_devices
from raybge.model.loaded_checks import check_token_ids
from raybge.model.loading import (
    ModelLocation,
    backbone_weights,
    copy_weights,
    load_tokenizer,
    save_merged,
    save_tokenizer_and_settings,
)
from raybge.model.lora import Lora
from raybge.model.output_options import OutputOptions
from raybge.model.packing import prepare_for_inference
from raybge.model.precision import inference_dtype
from raybge.model.quantization import quantize_embeddings
from raybge.model.similarity import inner_products
from raybge.model.text_lengths import limit_length
from raybge.util.errors import UserError
from raybge.util.lookahead import computed_ahead

__all__ = ["EmbeddingModel", "Encoder", "FolderSettings", "check_model_folder", "read_settings"]

# On a CPU a chunk of about this many tokens fits into the caches; larger ones are slower.
CPU_TOKENS_PER_CHUNK = 2048
TEXTS_PER_TOKENIZER_CALL = 2048  # it returns Python integers, which take ten times the memory of arrays


class Encoder:
    """An embedding model with its tokenizer, on one device or several; same interface as FlagEmbedding's FlagModel.

    Arguments that are None are taken from the model's folder: pooling, normalization, prompts, maximal length. Defaults
    of a folder without them: an encoder's first token or a decoder's last, normalized, no prompt, the model's own
    maximal length.

    Args:
        model_name_or_path: a local folder, or a name on the hub.
        normalize_embeddings: scale vectors to length 1.
        use_fp16: half precision on a GPU (default: on); never fp16 on a CPU, where it would round the weights without
            being faster.
        query_instruction_for_retrieval: instruction of queries; "" switches the folder's prompt off.
        query_instruction_format: two {}, for the instruction and the query.
        passage_instruction_for_retrieval: instruction of passages; "" switches the folder's prompt off.
        passage_instruction_format: two {}, for the instruction and the passage.
        devices: such as "cuda:1", 1 or "cpu"; None selects the GPU if there is one. Of several, such as
            ["cuda:0", "cuda:1"], each holds a copy of the model and takes a share of every call.
        pooling_method: "cls", "mean" or "last_token".
        trust_remote_code: run code of the model's folder.
        cache_dir: folder for models from the hub.
        batch_size: texts of maximal length in a chunk, which holds more of shorter ones. On a CPU a chunk is limited to
            the size that is fast there.
        query_max_length: maximal length of a query in tokens, special tokens included; at most the model's own.
        passage_max_length: maximal length of a passage in tokens, like `query_max_length`.
        convert_to_numpy: return numpy arrays instead of tensors.
        tokenizer_name: another tokenizer than the model's own.
        config_name: another configuration than the model's own.
        token: access token for the hub.
        use_fast_tokenizer: use the tokenizer written in Rust.
        truncate_dim: keep the leading numbers of each vector only, scaled to length 1 again if the model normalizes;
            for models trained with `--use_mrl`.
        lora: train adapters instead of the weights; a folder of adapters is trained further. None: a folder of adapters
            is loaded as the full model, adapters merged into their base.
        use_bf16: bf16 in place of fp16 on a GPU, for models whose vectors overflow in fp16; bf16 on a CPU that gains by
            it (with AMX).
        encode_backend: "torch", or on a CPU "onnx" or "openvino": a model is then exported once, into `export_dir`,
            unless `raybge.export_model` wrote its folder.
        encode_precision: "fp32", "bf16" (like `use_bf16`) or, except in torch, "int8"; None: `use_fp16` and `use_bf16`.
        export_dir: folder of exported models; None: raybge/exports in the user's cache folder.

    Raises:
        UserError: no such model, or one whose vectors raybge cannot reproduce.
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
        use_bf16: bool | None = None,
        encode_backend: str = "torch",
        encode_precision: str | None = None,
        export_dir: str | None = None,
    ) -> None:
        self.backend = BackendChoice.of(encode_backend, encode_precision, use_bf16)
        check_model_folder(model_name_or_path, "model_name_or_path", tokenizer_name)
        self.settings = read_settings(model_name_or_path, cache_dir, token)
        query = query_instruction_for_retrieval, query_instruction_format
        passage = passage_instruction_for_retrieval, passage_instruction_format
        self.instructions = Instructions(*query, *passage, self.settings.prompts)
        self._devices = pick_devices("cpu" if self.backend.exported and devices is None else devices)
        self.device = self._devices[0]
        self._on_cpu = any(device.type == "cpu" for device in self._devices)
        self.dtype = inference_dtype(self._on_cpu, *self.backend.half_precision(use_fp16))
        self.use_fp16 = self.dtype == torch.float16
        self._source = ModelLocation(
            model_name_or_path, self.settings, config_name, cache_dir, token, trust_remote_code
        )
        self.lora = lora
        place = tokenizer_name, use_fast_tokenizer, export_dir
        backbone = open_backbone(self._source, self.backend, self.dtype, self._devices, lora, *place)
        self._weight_names = frozenset(backbone.state_dict())
        self.tokenizer = load_tokenizer(self._source, tokenizer_name, use_fast_tokenizer)
        check_token_ids(self.tokenizer, tokenizer_name or model_name_or_path, backbone, model_name_or_path)
        normalize = self.settings.normalize if normalize_embeddings is None else normalize_embeddings
        model = EmbeddingModel(backbone, pooling_method or self.settings.pooling, normalize)
        self.model = model.to(self.device).eval()
        self.query_max_length = self._limit(query_max_length)
        self.passage_max_length = self._limit(passage_max_length)
        self.batch_size = batch_size
        self.convert_to_numpy = convert_to_numpy
        self.truncate_dim = self._width(truncate_dim) if truncate_dim is not None else None
        self.padding_reason: str | None = None  # why texts are padded on a GPU, once the model has run
        self._copy_to_devices()

    def __repr__(self) -> str:
        computes = self.backend if self.backend.exported else f"dtype={self.dtype}"
        return (
            f"Encoder({self._source.name!r}, pooling={self.model.pooling!r}, normalize={self.model.normalize}, "
            f"dim={self._width(self.truncate_dim)}, query_max_length={self.query_max_length}, "
            f"passage_max_length={self.passage_max_length}, {computes}, devices={[*map(str, self._devices)]})"
        )

    def _copy_to_devices(self) -> None:
        """Copy the current model to all devices except the first."""
        self._is_prepared = False
        self._copies = [copy.deepcopy(self.model).to(device) for device in self._devices[1:]]

    @property
    def dim(self) -> int:
        """Width D of the model's vectors, before `truncate_dim`."""
        return self.model.dim

    def _width(self, truncate_dim: int | None) -> int:
        """Return the width of truncated vectors; None: the model's width."""
        width = self.dim if truncate_dim is None else truncate_dim
        if not 1 <= width <= self.dim:
            raise UserError(f"truncate_dim must be from 1 to {self.dim}, this model's width; found {width}")
        return width

    def _limit(self, max_length: int | None) -> int:
        """Return the maximal length in tokens: the argument, else the folder's, at most the model's own."""
        return limit_length(max_length, self.settings, max_positions(self.model.backbone))

    def query_text(self, text: str, prompt: str | None = None) -> str:
        """Return the query with its instruction: the row's `prompt`, else the constructor's, else the folder's."""
        return self.instructions.query_text(text, prompt)

    def passage_text(self, text: str) -> str:
        """Return the passage with its instruction: the constructor's, else the folder's."""
        return self.instructions.passage_text(text)

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Return the token ids of each text with special tokens, truncated to `max_length`, without padding."""
        return token_ids(self.tokenizer, list(texts), max_length)

    def encode(
        self,
        sentences: str | Sequence[str],
        batch_size: int | None = None,
        max_length: int | None = None,
        convert_to_numpy: bool | None = None,
        **output: Unpack[OutputOptions],
    ) -> np.ndarray | Tensor:
        """Encode texts without an instruction; only the default prompt of the folder is put before them.

        Args:
            sentences: N texts, or one.
            batch_size: like the constructor's, for this call.
            max_length: maximal length in tokens; None: that of passages.
            convert_to_numpy: like the constructor's, for this call.
            **output: options of `OutputOptions`.

        Returns:
            (N, D) fp32, numpy or a torch tensor on the CPU; (D,) for a single str. `truncate_dim` and `precision`
            change width and type.
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
        """Encode queries like `encode`, with the instruction and the maximal length of queries."""
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
        """Encode passages like `encode`, with the instruction and the maximal length of passages."""
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
        """Tokenize, run and quantize; `instructed` adds the instruction to a text."""
        sentences = [texts] if isinstance(texts, str) else texts
        if unknown := output.keys() - OutputOptions.__annotations__.keys():
            raise TypeError(f"unexpected argument {', '.join(sorted(unknown))}")
        max_length = self._limit(max_length)
        parts = (
            sentences[start : start + TEXTS_PER_TOKENIZER_CALL]
            for start in range(0, len(sentences), TEXTS_PER_TOKENIZER_CALL)
        )
        groups: Iterable[list[np.ndarray]] = (
            [np.array(ids, np.int32) for ids in self.tokenize([instructed(text) for text in part], max_length)]
            for part in parts
        )
        # While a GPU computes, the CPU is free to tokenize; on a CPU both would share its cores.
        groups = groups if self._on_cpu else computed_ahead(groups)
        e_ND = self._embed(groups, len(sentences), max_length, batch_size, output)
        result = e_ND[0] if isinstance(texts, str) else e_ND
        precision = output.get("precision", "float32")
        if precision != "float32":
            ranges = output.get("ranges"), output.get("calibration_embeddings")
            result = torch.from_numpy(quantize_embeddings(result, precision, *ranges))
        return result.numpy() if (self.convert_to_numpy if as_numpy is None else as_numpy) else result

    def encode_token_ids(self, token_ids: Sequence[np.ndarray], max_length: int) -> np.ndarray:
        """Return the vectors (N, D), fp32, of texts that `tokenize` has truncated to `max_length` tokens."""
        return self._embed([token_ids], len(token_ids), max_length, None, {}).numpy()

    def _embed(
        self,
        token_groups: Iterable[Sequence[np.ndarray]],
        texts: int,
        max_length: int,
        batch_size: int | None,
        output: OutputOptions,
    ) -> Tensor:
        """Return the vectors of tokenized texts, which come in groups."""
        self._prepare()
        width = output.get("truncate_dim")
        width = self._width(self.truncate_dim if width is None else width)
        budget = (batch_size or self.batch_size) * max_length
        budget = min(budget, CPU_TOKENS_PER_CHUNK) if self._on_cpu else budget
        models = [self.model, *self._copies]
        return embed_texts(models, token_groups, texts, max_length, width, budget, output.get("show_progress_bar"))

    def _prepare(self) -> None:
        """Have the models pack texts on GPUs, before they are first used and after new weights."""
        if self._is_prepared:
            return
        failures = [prepare_for_inference(model) for model in (self.model, *self._copies)]
        self.padding_reason = next(filter(None, failures), None)
        self._is_prepared = True
        if self.padding_reason:
            warnings.warn(f"texts are padded, not packed: {self.padding_reason}", stacklevel=4)

    def similarity(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Compute the inner products of vectors: cosines if the model normalizes.

        For a model that does not normalize, longer vectors score higher; `normalize_embeddings=True` in the constructor
        gives cosines.

        Args:
            a: (N, D), or (D,) for one vector; see `inner_products`.
            b: (M, D), or (D,).

        Returns:
            (N, M), numpy or tensor like `a`.
        """
        return inner_products(a, b)

    def save(
        self, path: str | Path, state_dict: Mapping[str, Tensor] | None = None, merge_adapters: bool = False
    ) -> None:
        """Write the model as a sentence-transformers folder, which transformers and FlagEmbedding load as well.

        Its maximal length is the larger one of queries and passages; its prompts are the current instructions. The
        model card is left to the caller.

        Args:
            path: the folder; an existing model in it is replaced.
            state_dict: weights to write, named like those of a `ContrastiveModel`; needed if the weights in memory are
                sharded or renamed by torch.compile. None: those in memory.
            merge_adapters: with `lora`, write the full model with the adapters merged instead of the adapters.

        Raises:
            UserError: an instruction format adds something after the text, which such a folder cannot express.
        """
        self.backend.check_torch()
        settings = dataclasses.replace(
            self.settings,
            pooling=self.model.pooling,
            normalize=self.model.normalize,
            prompts={**self.settings.prompts, **self.instructions.prefixes()},
            max_length=max(self.query_max_length, self.passage_max_length),
        )
        weights = None if state_dict is None else backbone_weights(state_dict, self._weight_names)
        folder = Path(path)
        remove_weights(folder)
        if merge_adapters and self.lora:
            save_merged(self._backbone, folder, weights, self._source.trust_remote_code)
        else:
            self._backbone.save_pretrained(folder, state_dict=weights)
        save_tokenizer_and_settings(folder, self.tokenizer, settings, self.dim)

    def load_weights(self, path: str | Path) -> None:
        """Copy the weights of a folder of `save` into the model in memory, in place; adapters into adapters.

        Args:
            path: the folder.

        Raises:
            UserError: names or shapes of the weights differ from this model's.
        """
        self.backend.check_torch()
        copy_weights(self._backbone, str(path), self.lora is not None, self._source.trust_remote_code)
        self._copy_to_devices()

    @property
    def _backbone(self) -> Any:
        """The transformers model."""
        return self.model.backbone
