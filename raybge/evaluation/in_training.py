"""Retrieval evaluation in training, on the training workers: nDCG@10 and MRR@10 of --eval_data.

1. Each worker encodes the queries of its blocks; all query vectors are gathered on every worker.
2. Each worker encodes its passages block by block, scores each block against all queries and keeps the 10 best per
   query.
3. These lists are gathered and merged.

Texts are encoded and multiplied in units of a block or of a fixed number of queries, and ties are ordered by passage
id: the metrics are the same on every worker and for any number of workers.

Memory per worker: all query vectors, `SCORED_QUERIES` scores per passage of a block, at most `TOKEN_BYTES` of tokens
and, while the first evaluation searches for duplicates, about 60 bytes per passage of the whole corpus. Vectors of
passages are not kept.

Letters in tensor names: Q queries, P passages of the corpus, N texts of a block, M candidates, K ranks, W workers,
D width of a vector, r this worker's own rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raybge.data.token_cache import TokenCache
from raybge.evaluation.block_shares import (
    BlockGather,
    TokenizedShare,
    cached_tokenizer,
    find_answers,
    gather_texts,
    number_passages,
)
from raybge.evaluation.metrics import METRICS, measure
from raybge.evaluation.query_examples import (
    METRIC,
    QueryExample,
    RetrievalResult,
    build_examples,
    hit_ids,
    select_queries,
)
from raybge.evaluation.validation_data import ValidationData
from raybge.losses.global_batch import gather_counts, gather_rows
from raybge.model.embedding import eval_mode, max_positions
from raybge.model.encoder import Encoder
from raybge.model.precision import full_precision
from raybge.report.text import excerpt
from raybge.search import topk
from raybge.util.errors import UserError, log_errors

K = 10  # rank of METRICS
SCORED_QUERIES = 4096  # queries scored at a time
MERGED_QUERIES = 1024  # queries whose lists from all workers are in memory at a time
TOKEN_BYTES = 256 << 20  # tokens kept between evaluations, 4 bytes each; the rest is tokenized again


@dataclass(frozen=True)
class _Corpus:
    """State that a worker keeps between evaluations.

    Args:
        queries: Its share of the queries.
        passages: Its share of the distinct passages.
        ids: Ids of these passages by block, (N,).
        rows: Their rows in the block, by block, (N,).
        query_blocks: Gathers the rows of all queries.
        answers: Passage ids of every query's relevant passages, -1 for one that the corpus lacks.
    """

    queries: TokenizedShare
    passages: TokenizedShare
    ids: dict[int, Tensor]
    rows: dict[int, np.ndarray]
    query_blocks: BlockGather
    answers: list[np.ndarray]


class RetrievalValidator:
    """Measures retrieval on one worker's share. The first `measure` reads and tokenizes the corpus.

    Args:
        data: The data from `prepare`.
        rank: This worker.
        world: Number of workers; above 1, torch.distributed must be initialized.
        cache: Tokens shared with other runs on the same data.

    Attributes:
        last_result: Result of the last `measure`.
    """

    def __init__(self, data: ValidationData, rank: int, world: int, cache: TokenCache | None = None) -> None:
        self.data = data
        self.rank = rank
        self.world = world
        self.cache = cache
        self.last_result: RetrievalResult | None = None
        self._corpus: _Corpus | None = None

    def measure(self, encoder: Encoder, step: int = 0) -> dict[str, float]:
        """Measure METRICS, means over all queries. Collective: every worker calls it and gets the same result.

        The model runs on its own device, in its own precision or that of an autocast around the call; scores are fp32.
        Dropout is off, and no random number is drawn. Every worker calls the model equally often, as sharded parameters
        require.

        Args:
            encoder: The model.
            step: Number of updates that the model was trained for, for the error message.

        Returns:
            The metrics by name.

        Raises:
            UserError: On every worker, if vectors contain inf or nan.
        """
        with torch.no_grad(), eval_mode(encoder.model):
            if self._corpus is None:
                self._corpus = self._read(encoder)
            corpus = self._corpus
            own = [q_ND for _, q_ND in corpus.queries.encode(encoder)]
            q_rD = torch.cat([torch.empty(0, encoder.dim, device=encoder.device), *own])
            q_QD = corpus.query_blocks.gather(q_rD, [len(q_ND) for q_ND in own])
            score_QK, id_QK = _search(encoder, corpus, q_QD, step)
        values: dict[str, list[np.ndarray]] = {name: [] for name in METRICS}
        ids: list[np.ndarray] = []
        for start in range(0, len(q_QD), MERGED_QUERIES):
            part = slice(start, start + MERGED_QUERIES)
            ids_QK = _merge(score_QK[part], id_QK[part], self.world)
            ids.append(ids_QK)
            relevant = [dict.fromkeys(each[each >= 0].tolist(), 1) for each in corpus.answers[part]]
            absent = [[1] * int((each < 0).sum()) for each in corpus.answers[part]]
            part_values = measure(ids_QK, relevant, absent, [K])
            for name in METRICS:
                values[name].append(part_values[name])
        self.last_result = RetrievalResult(
            {name: np.concatenate(parts) for name, parts in values.items()}, np.concatenate(ids)
        )
        return {name: float(value_Q.mean()) for name, value_Q in self.last_result.values.items()}

    def examples(self, first: RetrievalResult, last: RetrievalResult) -> list[QueryExample]:
        """Return the queries that changed most between two evaluations, with texts. Collective.

        Only the blocks of these queries and of their passages are read again, each passage by its worker. Texts that
        cannot be read any more are logged and omitted: training is over, but its model is not saved yet.

        Args:
            first: An earlier result.
            last: A later result.

        Returns:
            The examples on worker 0; an empty list on other workers.
        """
        assert self._corpus is not None
        queries = select_queries(first.values[METRIC], last.values[METRIC])
        wanted = hit_ids((first, last), queries)
        own: dict[int, str] = {}
        with log_errors():
            for block, id_N in self._corpus.ids.items():
                if len(here := np.flatnonzero(np.isin(id_N.cpu().numpy(), wanted))):
                    texts = self.data.passages(block)
                    own |= {int(id_N[n]): excerpt(texts[self._corpus.rows[block][n]]) for n in here}
        texts_by_id = gather_texts(own, self._corpus.query_blocks.device)
        if self.rank == 0:
            with log_errors():
                return build_examples(self.data, first, last, queries, self._corpus.answers, texts_by_id)
        return []

    def _read(self, encoder: Encoder) -> _Corpus:
        """Read and tokenize the own blocks, drop duplicate passages, find the passage ids of all answers."""
        data, device = self.data, encoder.device
        room = max_positions(encoder.model.backbone)
        query_len, passage_len = (min(n, room or n) for n in (data.query_max_len, data.passage_max_len))
        own_queries = range(self.rank, len(data.queries.blocks), self.world)
        own_corpus = range(self.rank, len((data.corpus or data.queries).blocks), self.world)
        table, ids = number_passages(data, BlockGather(own_corpus, self.rank, device))

        def query_tokens(block: int) -> list[list[int]]:
            texts = [encoder.query_text(group.query, group.prompt) for group in data.groups(block)]
            return encoder.tokenize(texts, query_len)

        def passage_tokens(block: int) -> list[list[int]]:
            numbered = zip(data.passages(block), ids[block], strict=True)
            return encoder.tokenize([encoder.passage_text(text) for text, i in numbered if i >= 0], passage_len)

        tokenize = cached_tokenizer("queries", query_tokens, self.cache)
        queries = TokenizedShare(own_queries, tokenize, TOKEN_BYTES, device)
        tokenize = cached_tokenizer("passages", passage_tokens, self.cache)
        passages = TokenizedShare(own_corpus, tokenize, TOKEN_BYTES - queries.held_bytes, device)
        query_blocks = BlockGather(own_queries, self.rank, device)
        return _Corpus(
            queries,
            passages,
            ids={block: torch.from_numpy(i[i >= 0]).to(device) for block, i in ids.items()},
            rows={block: np.flatnonzero(i >= 0).astype(np.int32) for block, i in ids.items()},
            query_blocks=query_blocks,
            answers=find_answers(data, query_blocks, table),
        )


# --- search -----------------------------------------------------------------------------------------------------------


def _search(encoder: Encoder, corpus: _Corpus, q_QD: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return (score_QK, id_QK) of the best own passages for all queries; empty ranks have score -inf and id -1.

    All workers raise a UserError if vectors contain inf or nan.
    """
    score_QK = torch.full((len(q_QD), K), -torch.inf, device=q_QD.device)
    id_QK = torch.full((len(q_QD), K), topk.NO_ID, dtype=torch.int64, device=q_QD.device)
    finite = q_QD.isfinite().all()
    for block, p_ND in corpus.passages.encode(encoder):
        finite &= p_ND.isfinite().all()
        for start in range(0, len(q_QD) if len(p_ND) else 0, SCORED_QUERIES):
            part = slice(start, start + SCORED_QUERIES)
            _keep_best(score_QK[part], id_QK[part], _scores(q_QD[part], p_ND), corpus.ids[block])
    if not min(gather_counts([int(finite)], q_QD.device)[0]):
        raise UserError(_nonfinite_message(step))
    return score_QK, id_QK


def _nonfinite_message(step: int) -> str:
    if step:
        return (
            f"evaluation after step {step:,}: the model's vectors contain inf or nan, so training has diverged; lower "
            "--learning_rate"
        )
    return (
        "evaluation before the first step: the model's vectors contain inf or nan; use --bf16 in place of --fp16, or "
        "another --model_name_or_path"
    )


def _scores(q_QD: Tensor, p_ND: Tensor) -> Tensor:
    """Return inner products in fp32, for any precision of the model."""
    with full_precision(q_QD.device):
        return q_QD @ p_ND.T


def _keep_best(score_QK: Tensor, id_QK: Tensor, score_QN: Tensor, id_N: Tensor) -> None:
    """Merge new candidates into the lists, in place. Their ids must be above those of earlier candidates.

    A stable sort then orders ties by id. Once many passages have been scored, few queries find a better one.
    """
    hot_Q = (score_QN.max(dim=1).values > score_QK[:, -1]).nonzero().squeeze(1)
    all_QM = torch.cat([score_QK[hot_Q], score_QN[hot_Q]], dim=1)
    ids_QM = torch.cat([id_QK[hot_Q], id_N.expand(len(hot_Q), -1)], dim=1)
    sorted_QM, column_QM = all_QM.sort(dim=1, descending=True, stable=True)
    score_QK[hot_Q] = sorted_QM[:, :K]
    id_QK[hot_Q] = ids_QM.gather(1, column_QM[:, :K])


def _merge(score_QK: Tensor, id_QK: Tensor, world: int) -> np.ndarray:
    """Merge all workers' lists into the (Q, K) passage ids of the best. Collective."""
    counts_W = [len(id_QK)] * world
    scores, ids = (gather_rows(x, counts_W).cpu().numpy().reshape(world, -1, K) for x in (score_QK, id_QK))
    return topk.merge(list(zip(scores, ids, strict=True)), K)[1]
