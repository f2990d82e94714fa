"""Cross-encoder: scores a query and a passage together, slower and more accurately than by comparing their vectors.

    from raybge.model.reranker import Reranker
    reranker = Reranker("BAAI/bge-reranker-v2-m3")
    score_N = reranker.compute_score([("what is a lane?", "A lane is ..."), ("what is a lane?", "The weather ...")])

Letters in tensor names: N input pairs, B pairs in a chunk, T tokens of its longest.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raybge.model.embedding import max_positions, plan_chunks
from raybge.model.encoder import CPU_TOKENS_PER_CHUNK
from raybge.model.folder import FolderSettings
from raybge.model.folder_checks import check_reranker
from raybge.model.inference import pick_device
from raybge.model.loaded_checks import check_token_ids
from raybge.model.loading import ModelLocation, load_classifier, load_tokenizer
from raybge.model.precision import inference_dtype
from raybge.util.errors import UserError

__all__ = ["Reranker", "check_reranker"]

PairTokens = tuple[list[int], list[int]]  # token ids and token types of a pair
_MAX_LENGTH = 512  # the recipe's default


class Reranker:
    """A cross-encoder with its tokenizer, on one device; same interface as FlagEmbedding's FlagReranker.

    Args:
        model_name_or_path: a local folder, or a name on the hub: a sequence classifier with one output.
        use_fp16: half precision on a GPU (default: on); never on a CPU, where it would round the weights without being
            faster.
        devices: one device, such as "cuda:1", 1 or "cpu"; None selects the GPU if there is one.
        trust_remote_code: run code of the model's folder.
        cache_dir: folder for models from the hub.
        batch_size: pairs of maximal length in a chunk, which holds more of shorter ones. On a CPU a chunk is limited to
            the size that is fast there.
        max_length: maximal length of a pair in tokens, special tokens included; passages are truncated to it. At most
            the model's own; None: the model's own, the tokenizer's or 512, whichever is least.
        query_max_length: maximal length of a query in tokens, without special tokens; at least one token is left to
            the passage. None: three quarters of `max_length`.
        use_bf16: bf16 in place of fp16 on a GPU, for models whose vectors overflow in fp16; bf16 on a CPU that gains by
            it (with AMX).

    Raises:
        UserError: no such model, or a length without room for both texts.
    """

    def __init__(
        self,
        model_name_or_path: str,
        use_fp16: bool | None = None,
        devices: str | int | Sequence[str | int] | None = None,
        trust_remote_code: bool = False,
        cache_dir: str | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        query_max_length: int | None = None,
        use_bf16: bool | None = None,
    ) -> None:
        check_reranker(model_name_or_path, "the reranker", cache_dir, trust_remote_code)
        self.device = pick_device(devices)
        dtype = inference_dtype(self.device.type == "cpu", use_fp16, use_bf16)
        self.use_fp16 = dtype == torch.float16
        source = ModelLocation(
            model_name_or_path, FolderSettings(), cache_dir=cache_dir, trust_remote_code=trust_remote_code
        )
        model = load_classifier(source, dtype)
        self.tokenizer = load_tokenizer(source, None, True)
        check_token_ids(self.tokenizer, model_name_or_path, model, model_name_or_path)
        self.model = model.to(self.device).eval()
        self.batch_size = batch_size
        self._config: Any = model.config.get_text_config()
        pad_id = getattr(self._config, "pad_token_id", None)
        self._pad_id = None if pad_id is None or pad_id < 0 else int(pad_id)
        self._frame = _read_frame(self.tokenizer)
        # the tokenizer may return token types that the model does not accept
        accepted = inspect.signature(model.forward).parameters.keys() & set(self.tokenizer.model_input_names)
        self._has_types = "token_type_ids" in accepted
        self.max_length, self.query_max_length = self._limits(max_length, query_max_length)

    def _limits(self, max_length: int | None, query_max_length: int | None) -> tuple[int, int]:
        """Return the maximal lengths in tokens of a pair, with special tokens, and of a query, without them."""
        length = min(_MAX_LENGTH, self.tokenizer.model_max_length) if max_length is None else max_length
        length = min(length, max_positions(self.model) or length)
        special = self._frame.special
        if length < special + 2:
            parts = f"a query, a passage and {special} special tokens"
            raise UserError(f"max_length {length}: expected at least {special + 2}, for {parts}")
        if query_max_length is not None and query_max_length < 1:
            raise UserError(f"query_max_length must be at least 1 token, found {query_max_length}")
        return length, min(query_max_length or length * 3 // 4, length - special - 1)

    def compute_score(self, pairs: Sequence[tuple[str, str]], normalize: bool = False) -> np.ndarray:
        """Score N pairs of a query and a passage; a higher score is more relevant.

        Args:
            pairs: (query, passage) without instructions, which rerankers of this kind do not have.
            normalize: return the sigmoid of the model's output, between 0 and 1, instead of the output itself.

        Returns:
            (N,) fp32 in the order of the pairs. A score's last bits may depend on the other pairs of its chunk.
        """
        return self.score_tokens(self.tokenize(pairs), normalize)

    def score_tokens(self, tokens: Sequence[PairTokens], normalize: bool = False) -> np.ndarray:
        """Score pairs that are tokenized by `tokenize`, like `compute_score`."""
        budget = self.batch_size * self.max_length
        if self.device.type == "cpu":
            budget = min(budget, CPU_TOKENS_PER_CHUNK)
        # `_fill` needs an id that no text of the chunk ends with
        max_pairs = self._config.vocab_size - 1 if self._pad_id is None else None
        score_N = torch.empty(len(tokens))
        with torch.no_grad():
            for rows in plan_chunks([len(ids) for ids, _ in tokens], budget, max_pairs):
                logits_B1 = self.model(**self._pad([tokens[row] for row in rows])).logits
                score_N[rows] = logits_B1[:, 0].float().cpu()
        return (score_N.sigmoid() if normalize else score_N).numpy()

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> list[PairTokens]:
        """Return token ids and token types of each pair: the query is truncated first, then the passage to the rest."""
        if not pairs:
            return []
        options = {"add_special_tokens": False, "truncation": True}
        texts = [list(part) for part in zip(*pairs, strict=True)]
        queries = self.tokenizer(texts[0], max_length=self.query_max_length, **options)["input_ids"]
        passages = self.tokenizer(texts[1], max_length=self.max_length, **options)["input_ids"]
        side = self.tokenizer.truncation_side
        special = self._frame.special
        tokens = []
        for query, passage in zip(queries, passages, strict=True):
            room = self.max_length - special - len(query)
            passage = passage[-room:] if side == "left" else passage[:room]
            ids, types = self._frame.join(query, passage)
            # two empty texts without special tokens: models reject an input without tokens
            tokens.append((ids, types) if ids else ([self.tokenizer.pad_token_id], [0]))
        return tokens

    def _pad(self, tokens: Sequence[PairTokens]) -> dict[str, Tensor]:
        """Return the model's inputs (B, T) for one chunk, padded on the right, on its device."""
        shape = len(tokens), max(len(ids) for ids, _ in tokens)
        ids_BT = np.full(shape, self._fill({ids[-1] for ids, _ in tokens}), dtype=np.int64)
        mask_BT = np.zeros(shape, dtype=np.int64)
        types_BT = np.zeros(shape, dtype=np.int64)
        for b, (ids, types) in enumerate(tokens):
            ids_BT[b, : len(ids)] = ids
            mask_BT[b, : len(ids)] = 1
            types_BT[b, : len(types)] = types
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if self._has_types:
            inputs["token_type_ids"] = types_BT
        return {name: torch.from_numpy(values).to(self.device) for name, values in inputs.items()}

    def _fill(self, last: set[int]) -> int:
        """Return the id to pad with, for texts that end with the tokens `last`.

        Decoders take the score from the last token that is not the configuration's padding, which may differ from the
        tokenizer's. If the configuration has none, any id is suitable that no text of the chunk ends with.
        """
        if self._pad_id is not None:
            return self._pad_id
        self._config.pad_token_id = next(i for i in range(len(last) + 1) if i not in last)
        return int(self._config.pad_token_id)


@dataclass(frozen=True)
class _Frame:
    """Template of a tokenizer for a pair: a sample pair with the places of its texts.

    Joining token ids is exact; truncating a text and tokenizing it again is not.

    Args:
        ids: token ids of the sample pair.
        types: token types of the sample pair.
        cuts: start and end of the query, start and end of the passage.
    """

    ids: list[int]
    types: list[int]
    cuts: list[int]

    @property
    def special(self) -> int:
        """Number of special tokens in a pair."""
        return len(self.join([], [])[0])

    def join(self, query: list[int], passage: list[int]) -> tuple[list[int], list[int]]:
        """Return a pair's token ids and token types from the token ids of its texts without special tokens."""
        a, b, c, d = self.cuts
        query_types, passage_types = [self.types[a]] * len(query), [self.types[c]] * len(passage)
        ids = [*self.ids[:a], *query, *self.ids[b:c], *passage, *self.ids[d:]]
        return ids, [*self.types[:a], *query_types, *self.types[b:c], *passage_types, *self.types[d:]]


def _read_frame(tokenizer: Any) -> _Frame:
    """Read the tokens that the tokenizer adds before, between and after the two texts of a pair."""
    query, passage = tokenizer(["a", "b"], add_special_tokens=False)["input_ids"]
    pair = tokenizer("a", "b")
    ids = pair["input_ids"]
    cuts: list[int] = []
    for text in (query, passage):
        starts = range(cuts[-1] if cuts else 0, len(ids))
        start = next((i for i in starts if ids[i : i + len(text)] == text), None)
        if start is None:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} does not put the passage after the query")
        cuts += [start, start + len(text)]
    return _Frame(ids, pair.get("token_type_ids") or [0] * len(ids), cuts)
