"""Blocks of queries and passages shared out among training workers: gathering their rows, and their tokens.

Worker r owns blocks r, r + W, r + 2W, … of each side. Letters in tensor names: N rows of all workers, P passages of the
corpus, Q queries, W workers, D width of a vector, r this worker's own rows.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raybge.data.groups import text_key
from raybge.data.token_cache import TokenCache
from raybge.evaluation.validation_data import ValidationData
from raybge.losses.global_batch import gather_counts, gather_rows
from raybge.model.embedding import plan_chunks
from raybge.model.encoder import CPU_TOKENS_PER_CHUNK, Encoder
from raybge.search import topk
from raybge.search.deduplication import first_of_each
from raybge.search.key_table import KeyTable, key_words

GPU_TOKENS_PER_CHUNK = 16_384
BlockTokens = tuple[np.ndarray, np.ndarray]  # int32: the tokens of a block's texts, concatenated; each text's length


class BlockGather:
    """Gathers the rows of all blocks in the order of the blocks. Its methods are collective.

    Args:
        blocks: This worker's blocks, ascending.
        rank: This worker.
        device: Where rows are gathered.
    """

    def __init__(self, blocks: Sequence[int], rank: int, device: torch.device) -> None:
        self.blocks = blocks
        self.rank = rank
        self.device = device

    def gather(self, x_r: Tensor, rows: Sequence[int]) -> Tensor:
        """Gather the rows of all workers, given the own rows and their number in each own block."""
        counts_W = gather_counts([len(x_r)], self.device)[0]
        return gather_rows(x_r.to(self.device), counts_W)[self._order(rows, counts_W)]

    def own(self, x_N: Tensor, rows: Sequence[int]) -> Tensor:
        """Return the own rows of gathered rows: the inverse of `gather`."""
        counts_W = gather_counts([sum(rows)], self.device)[0]
        original_N = torch.empty_like(x_N)
        original_N[self._order(rows, counts_W)] = x_N
        return original_N.split(counts_W)[self.rank]

    def _order(self, rows: Sequence[int], counts_W: list[int]) -> Tensor:
        block_r = torch.tensor(self.blocks, dtype=torch.int64).repeat_interleave(torch.tensor(rows, dtype=torch.int64))
        return gather_rows(block_r.to(self.device), counts_W).argsort(stable=True)

    def gather_keys(self, keys: Sequence[np.ndarray]) -> np.ndarray:
        """Gather the (N, 2) uint64 keys of all workers, given those of each own block."""
        keys_r2 = np.concatenate([np.zeros((0, 2), np.uint64), *keys])
        # Some backends cannot send unsigned integers.
        gathered = self.gather(torch.from_numpy(keys_r2.view(np.int64)), [len(each) for each in keys])
        keys_N2: np.ndarray = gathered.cpu().numpy().view(np.uint64)
        return keys_N2


class TokenizedShare:
    """This worker's blocks of one side as tokens, kept in memory between evaluations as far as they fit.

    Args:
        blocks: This worker's blocks.
        tokenize: Returns the tokens of a block.
        max_bytes: Bytes of tokens to keep; the other blocks are tokenized again each time.
        device: The model's device.

    Attributes:
        held_bytes: Bytes of tokens in memory.
        calls: Number of model calls, the same on every worker: that of the worker that needs most.
    """

    def __init__(
        self, blocks: Sequence[int], tokenize: Callable[[int], BlockTokens], max_bytes: int, device: torch.device
    ) -> None:
        self.blocks = blocks
        self.tokenize = tokenize
        self.budget = CPU_TOKENS_PER_CHUNK if device.type == "cpu" else GPU_TOKENS_PER_CHUNK
        self.held: dict[int, BlockTokens] = {}
        self.held_bytes = 0
        needed = 0
        for block in blocks:
            tokens, lengths = tokenize(block)
            needed += len(plan_chunks(lengths.tolist(), self.budget))
            if self.held_bytes + tokens.nbytes + lengths.nbytes <= max_bytes:
                self.held_bytes += tokens.nbytes + lengths.nbytes
                self.held[block] = tokens, lengths
        self.calls = max(gather_counts([needed], device)[0])

    def encode(self, encoder: Encoder) -> Iterator[tuple[int, Tensor]]:
        """Yield (block, e_ND) of each own block; exhaust the iterator, since calls of sharded models are collective."""
        calls = 0
        for block in self.blocks:
            token_ids = self._token_ids(block)
            e_ND = torch.empty(len(token_ids), encoder.dim, device=encoder.device)
            for rows in plan_chunks([len(ids) for ids in token_ids], self.budget):
                e_ND[rows] = encoder.model.embed([token_ids[row] for row in rows], self.budget)
                calls += 1
            yield block, e_ND
        for _ in range(calls, self.calls):
            encoder.model.embed([[0]], self.budget)  # discarded: other workers gather parameters from this one

    def _token_ids(self, block: int) -> Sequence[np.ndarray]:
        tokens, lengths = self.held[block] if block in self.held else self.tokenize(block)
        return np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []


def cached_tokenizer(
    name: str, tokenize: Callable[[int], list[list[int]]], cache: TokenCache | None
) -> Callable[[int], BlockTokens]:
    """Wrap a tokenizer of blocks so that tokens are read from the cache, if there is one.

    Args:
        name: Prefix of the cache's entries.
        tokenize: Returns the token ids of each text of a block.
        cache: The cache.

    Returns:
        A function from a block to its tokens.
    """

    def tables(block: int) -> Iterator[pa.Table]:
        ids = tokenize(block)
        tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32)
        lengths = np.fromiter(map(len, ids), np.int32)
        yield pa.table({"tokens": pa.array([tokens]), "lengths": pa.array([lengths])})

    def tokens_of(block: int) -> BlockTokens:
        make = functools.partial(tables, block)
        [table] = cache.tables(f"{name}-{block}", make) if cache else make()
        tokens, lengths = (np.array(table.column(column)[0].values) for column in ("tokens", "lengths"))
        return tokens, lengths

    return tokens_of


def number_passages(data: ValidationData, blocks: BlockGather) -> tuple[KeyTable, dict[int, np.ndarray]]:
    """Number the corpus's distinct texts in the order of their first occurrence. Collective.

    Args:
        data: The validation data.
        blocks: This worker's blocks of the corpus.

    Returns:
        The texts' keys, and for each own block the ids of its passages, -1 for a text that occurred before.
    """
    keys = [key_words([text_key(text) for text in data.passages(block)]) for block in blocks.blocks]
    rows = [len(each) for each in keys]
    keys_P2 = blocks.gather_keys(keys)
    keep_P = first_of_each(keys_P2)
    id_P = np.where(keep_P, np.cumsum(keep_P) - 1, topk.NO_ID)
    own_r = blocks.own(torch.from_numpy(id_P).to(blocks.device), rows).cpu().numpy()
    starts = np.cumsum([0, *rows])
    ids = {block: own_r[a:b] for block, (a, b) in zip(blocks.blocks, itertools.pairwise(starts), strict=True)}
    return KeyTable(keys_P2[keep_P]), ids


def find_answers(data: ValidationData, blocks: BlockGather, table: KeyTable) -> list[np.ndarray]:
    """Find the passage ids of every query's distinct relevant passages, -1 if not in the corpus. Collective.

    Args:
        data: The validation data.
        blocks: This worker's blocks of the queries.
        table: Keys of the corpus's texts.

    Returns:
        One array per query, for the queries of all workers.
    """
    answers = [[dict.fromkeys(group.pos) for group in data.groups(block)] for block in blocks.blocks]
    keys_N2 = blocks.gather_keys([key_words([text_key(t) for each in block for t in each]) for block in answers])
    own = torch.tensor([len(each) for block in answers for each in block], dtype=torch.int64)
    counts_Q = blocks.gather(own, [len(block) for block in answers]).cpu().numpy()
    return np.split(table.find_one(keys_N2), np.cumsum(counts_Q)[:-1])


def gather_texts(texts: Mapping[int, str], device: torch.device) -> dict[int, str]:
    """Gather the texts of all workers by passage id, given the own ones. Collective."""
    packed = np.frombuffer(json.dumps(list(texts.items())).encode(), np.uint8).copy()
    counts = gather_counts([len(packed)], device)[0]
    everything = gather_rows(torch.from_numpy(packed).to(device), counts).cpu().numpy()
    parts = np.split(everything, np.cumsum(counts)[:-1])
    return {i: text for part in parts for i, text in json.loads(part.tobytes())}
