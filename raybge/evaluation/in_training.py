"""Retrieval measured while training, on the training workers: nDCG@10 and MRR@10 of --eval_data.

The blocks of queries and corpus are dealt to the workers in turn. Each worker encodes its queries, and all vectors of
queries are gathered; then it encodes its passages block by block, scores each block against all queries and keeps each
one's 10 best. These lists are gathered and merged. What is encoded or multiplied together is a block or a fixed
number of queries, and ties go by passage id: the numbers are the same on every worker, and for any number of them.

Memory of a worker: all query vectors, `SCORED` scores for each passage of a block, at most `HELD_BYTES` of tokens, and
while the first evaluation looks for duplicates about 60 bytes a passage of the whole corpus. Passages' vectors are not
kept.

Letters in tensor names: Q queries, P passages of the corpus, N texts of a block, M candidates, K ranks, W workers,
D width of a vector, r this worker's own rows.
"""

from __future__ import annotations

import functools
import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from raybge.data.groups import text_key
from raybge.data.token_cache import TokenFiles
from raybge.evaluation.eval_data import ValidationConfig
from raybge.evaluation.metrics import measure
from raybge.evaluation.query_examples import Retrieved, Shown, chosen, gather_texts, passages_of, shown
from raybge.losses.objective import gather_counts, gather_rows
from raybge.model.embedding import max_positions, plan_chunks
from raybge.model.encoder import CPU_TOKENS_PER_CHUNK, Encoder
from raybge.report.page import cut
from raybge.search import topk
from raybge.search.deduplication import first_of_each
from raybge.search.shards import KeyTable, words_of
from raybge.util.errors import UserError

K = 10
NAMES = (f"nDCG@{K}", f"MRR@{K}")
GPU_TOKENS_PER_CHUNK = 16_384
SCORED = 4096  # queries scored at a time
MERGED = 1024  # queries whose lists from all workers are held at a time
_Tokens = tuple[np.ndarray, np.ndarray]  # int32: of a block's texts, one after the other, and how many each text has
HELD_BYTES = 256 << 20  # tokens kept from one evaluation to the next, 4 bytes each; what is above is tokenised anew


class Validation:
    """Measures one worker's share. The corpus is read and tokenised at the first `measure`.

    Args:
        config: as `prepare` made it.
        rank, world: this worker and the number of all of them; above 1 torch.distributed must be initialised.
        kept: tokens that need not be made again.
    """

    def __init__(self, config: ValidationConfig, rank: int, world: int, kept: TokenFiles | None = None) -> None:
        self.config = config
        self.rank = rank
        self.world = world
        self.kept = kept
        self.last: Retrieved | None = None  # what the last `measure` found
        self._task: _Task | None = None

    def measure(self, encoder: Encoder) -> dict[str, float]:
        """{"nDCG@10", "MRR@10"}, means over all queries. Collective: every worker calls it, and has the same result.

        The model runs on its own device, in its own precision or that of an autocast around the call; scores are fp32.
        Dropout is off meanwhile, and no random number is drawn. Every worker calls the model equally often, as sharded
        parameters demand. Raises UserError, on every worker, where vectors hold inf or nan.
        """
        with torch.no_grad(), _evaluating(encoder.model):
            if self._task is None:
                self._task = self._read(encoder)
            task = self._task
            own = [q_ND for _, q_ND in task.queries.encode(encoder)]
            q_rD = torch.cat([torch.empty(0, encoder.dim, device=encoder.device), *own])
            q_QD = task.deal.gather(q_rD, [len(q_ND) for q_ND in own])
            score_QK, id_QK = _search(encoder, task, q_QD)
        values: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
        ids: list[np.ndarray] = []
        for start in range(0, len(q_QD), MERGED):
            part = slice(start, start + MERGED)
            ids_QK = _merge(score_QK[part], id_QK[part], self.world)
            ids.append(ids_QK)
            found = [dict.fromkeys(each[each >= 0].tolist(), 1) for each in task.answers[part]]
            absent = [[1] * int((each < 0).sum()) for each in task.answers[part]]
            judged = measure(ids_QK, found, absent, [K])
            for name in NAMES:
                values[name].append(judged[name])
        self.last = Retrieved({name: np.concatenate(parts) for name, parts in values.items()}, np.concatenate(ids))
        return {name: float(value_Q.mean()) for name, value_Q in self.last.values.items()}

    def shown(self, first: Retrieved, last: Retrieved) -> list[Shown]:
        """The queries that changed most between two evaluations, with their texts; none but on worker 0. Collective.

        Only the blocks of the passages and queries that are shown are read again, the passages' each by its worker.
        What cannot be read any more is said in the log and left out: training is over, and its model not yet saved.
        """
        assert self._task is not None
        queries = chosen(first, last)
        wanted = passages_of((first, last), queries)
        own: dict[int, str] = {}
        with _said_in_log():
            for block, id_N in self._task.ids.items():
                if len(here := np.flatnonzero(np.isin(id_N.cpu().numpy(), wanted))):
                    texts = self.config.passages(block)
                    own |= {int(id_N[n]): cut(texts[self._task.places[block][n]]) for n in here}
        found = gather_texts(own, self._task.deal.device)
        if self.rank == 0:
            with _said_in_log():
                return shown(self.config, first, last, queries, self._task.answers, found)
        return []

    def _read(self, encoder: Encoder) -> _Task:
        """Read and tokenise the own blocks; drop the corpus's duplicates; find the passage id of every answer."""
        config, device = self.config, encoder.device
        room = max_positions(encoder.model.backbone)
        query_len, passage_len = (min(n, room or n) for n in (config.query_max_len, config.passage_max_len))
        own_queries = range(self.rank, len(config.queries.blocks), self.world)
        own_corpus = range(self.rank, len((config.corpus or config.queries).blocks), self.world)
        table, ids = _number_passages(config, _Deal(own_corpus, self.rank, device))

        def query_tokens(block: int) -> list[list[int]]:
            texts = [encoder.query_text(group.query, group.prompt) for group in config.groups(block)]
            return encoder.tokenize(texts, query_len)

        def passage_tokens(block: int) -> list[list[int]]:
            numbered = zip(config.passages(block), ids[block], strict=True)
            return encoder.tokenize([encoder.passage_text(text) for text, i in numbered if i >= 0], passage_len)

        queries = _Share(own_queries, self._tokens("queries", query_tokens), HELD_BYTES, device)
        corpus = _Share(own_corpus, self._tokens("passages", passage_tokens), HELD_BYTES - queries.held_bytes, device)
        kept = {block: torch.from_numpy(i[i >= 0]).to(device) for block, i in ids.items()}
        places = {block: np.flatnonzero(i >= 0).astype(np.int32) for block, i in ids.items()}
        deal = _Deal(own_queries, self.rank, device)
        return _Task(queries, corpus, kept, places, deal, _find_answers(config, deal, table))

    def _tokens(self, name: str, tokenize: Callable[[int], list[list[int]]]) -> Callable[[int], _Tokens]:
        """A block's tokens, from those that are kept where there are any."""

        def tables(block: int) -> Iterator[pa.Table]:
            ids = tokenize(block)
            tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32)
            lengths = np.fromiter(map(len, ids), np.int32)
            yield pa.table({"tokens": pa.array([tokens]), "lengths": pa.array([lengths])})

        def of_block(block: int) -> _Tokens:
            make = functools.partial(tables, block)
            [table] = self.kept.tables(f"{name}-{block}", make) if self.kept else make()
            tokens, lengths = (np.array(table.column(column)[0].values) for column in ("tokens", "lengths"))
            return tokens, lengths

        return of_block


# --- read -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What a worker keeps between evaluations.

    Its shares of queries and corpus; the passage ids of each of its blocks of the corpus, and where in the block these
    passages are; how the rows of all queries
    are gathered, and in that order the passage ids of each one's answers, -1 for an answer that the corpus lacks.
    """

    queries: _Share
    corpus: _Share
    ids: dict[int, Tensor]
    places: dict[int, np.ndarray]
    deal: _Deal
    answers: list[np.ndarray]


class _Deal:
    """Gathers rows of blocks that are dealt to the workers in turn, in the order of the blocks.

    Args:
        blocks: the own ones, ascending.
    """

    def __init__(self, blocks: Sequence[int], rank: int, device: torch.device) -> None:
        self.blocks = blocks
        self.rank = rank
        self.device = device

    def gather(self, x_r: Tensor, rows: Sequence[int]) -> Tensor:
        """Rows of all workers, from the own ones and how many of them each own block has."""
        counts_W = gather_counts([len(x_r)], self.device)[0]
        return gather_rows(x_r.to(self.device), counts_W)[self._order(rows, counts_W)]

    def own(self, x_N: Tensor, rows: Sequence[int]) -> Tensor:
        """The own ones of gathered rows: undoes `gather`."""
        counts_W = gather_counts([sum(rows)], self.device)[0]
        back_N = torch.empty_like(x_N)
        back_N[self._order(rows, counts_W)] = x_N
        return back_N.split(counts_W)[self.rank]

    def _order(self, rows: Sequence[int], counts_W: list[int]) -> Tensor:
        block_r = torch.tensor(self.blocks, dtype=torch.int64).repeat_interleave(torch.tensor(rows, dtype=torch.int64))
        return gather_rows(block_r.to(self.device), counts_W).argsort(stable=True)

    def gather_keys(self, keys: Sequence[np.ndarray]) -> np.ndarray:
        """(N, 2) keys of all workers, from those of each own block."""
        keys_r2 = np.concatenate([np.zeros((0, 2), np.uint64), *keys])
        # not every backend can send unsigned words
        gathered = self.gather(torch.from_numpy(keys_r2.view(np.int64)), [len(each) for each in keys])
        return gathered.cpu().numpy().view(np.uint64)


class _Share:
    """The own blocks of one side as tokens, held from one evaluation to the next as far as `room` bytes go.

    `calls` is how often each worker calls the model for its share: as often as the one that needs it most.
    """

    def __init__(
        self, blocks: Sequence[int], tokenize: Callable[[int], _Tokens], room: int, device: torch.device
    ) -> None:
        self.blocks = blocks
        self.tokenize = tokenize
        self.budget = CPU_TOKENS_PER_CHUNK if device.type == "cpu" else GPU_TOKENS_PER_CHUNK
        self.held: dict[int, _Tokens] = {}
        self.held_bytes = 0
        needed = 0
        for block in blocks:
            tokens, lengths = tokenize(block)
            needed += len(plan_chunks(lengths.tolist(), self.budget))
            if self.held_bytes + tokens.nbytes + lengths.nbytes <= room:
                self.held_bytes += tokens.nbytes + lengths.nbytes
                self.held[block] = tokens, lengths
        self.calls = max(gather_counts([needed], device)[0])

    def encode(self, encoder: Encoder) -> Iterator[tuple[int, Tensor]]:
        """(block, e_ND) of each own block; to be run to its end."""
        calls = 0
        for block in self.blocks:
            token_ids = self._tokens(block)
            e_ND = torch.empty(len(token_ids), encoder.dim, device=encoder.device)
            for rows in plan_chunks([len(ids) for ids in token_ids], self.budget):
                e_ND[rows] = encoder.model.embed([token_ids[row] for row in rows], self.budget)
                calls += 1
            yield block, e_ND
        for _ in range(calls, self.calls):
            encoder.model.embed([[0]], self.budget)  # of no use but to those who wait for this worker's parameters

    def _tokens(self, block: int) -> Sequence[np.ndarray]:
        tokens, lengths = self.held[block] if block in self.held else self.tokenize(block)
        return np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _number_passages(config: ValidationConfig, deal: _Deal) -> tuple[KeyTable, dict[int, np.ndarray]]:
    """Number the corpus's distinct texts in the order of their first appearance.

    Returns:
        Their keys, and for each own block the ids of its passages, -1 where the text came before.
    """
    keys = [words_of([text_key(text) for text in config.passages(block)]) for block in deal.blocks]
    rows = [len(each) for each in keys]
    keys_P2 = deal.gather_keys(keys)
    keep_P = first_of_each(keys_P2)
    id_P = np.where(keep_P, np.cumsum(keep_P) - 1, topk.NOTHING)
    own_r = deal.own(torch.from_numpy(id_P).to(deal.device), rows).cpu().numpy()
    starts = np.cumsum([0, *rows])
    ids = {block: own_r[a:b] for block, (a, b) in zip(deal.blocks, itertools.pairwise(starts), strict=True)}
    return KeyTable(keys_P2[keep_P]), ids


def _find_answers(config: ValidationConfig, deal: _Deal, table: KeyTable) -> list[np.ndarray]:
    """The passage ids of the distinct answers of every query."""
    answers = [[dict.fromkeys(group.pos) for group in config.groups(block)] for block in deal.blocks]
    keys_N2 = deal.gather_keys([words_of([text_key(t) for each in block for t in each]) for block in answers])
    own = torch.tensor([len(each) for block in answers for each in block], dtype=torch.int64)
    counts_Q = deal.gather(own, [len(block) for block in answers]).cpu().numpy()
    return np.split(table.find_one(keys_N2), np.cumsum(counts_Q)[:-1])


# --- search -----------------------------------------------------------------------------------------------------------


def _search(encoder: Encoder, task: _Task, q_QD: Tensor) -> tuple[Tensor, Tensor]:
    """(score_QK, id_QK): the best of the own passages for all queries; what is missing has score -inf and id -1."""
    score_QK = torch.full((len(q_QD), K), -torch.inf, device=q_QD.device)
    id_QK = torch.full((len(q_QD), K), topk.NOTHING, dtype=torch.int64, device=q_QD.device)
    finite = q_QD.isfinite().all()
    for block, p_ND in task.corpus.encode(encoder):
        finite &= p_ND.isfinite().all()
        for start in range(0, len(q_QD) if len(p_ND) else 0, SCORED):
            part = slice(start, start + SCORED)
            _keep_best(score_QK[part], id_QK[part], _scores(q_QD[part], p_ND), task.ids[block])
    if not min(gather_counts([int(finite)], q_QD.device)[0]):
        raise UserError("evaluation: the model gives vectors with inf or nan; is the learning rate too high?")
    return score_QK, id_QK


def _scores(q_QD: Tensor, p_ND: Tensor) -> Tensor:
    """Inner products in fp32, also where the model runs in less."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(q_QD.device.type, enabled=False):
            return q_QD @ p_ND.T
    finally:
        matmul.fp32_precision = before


def _keep_best(score_QK: Tensor, id_QK: Tensor, score_QN: Tensor, id_N: Tensor) -> None:
    """Put what is better than the worst of the lists into them, in place. Ids must be above those that came before.

    A stable sort then lists ties by id. Few queries find anything better once many passages have been seen.
    """
    hot_Q = (score_QN.max(dim=1).values > score_QK[:, -1]).nonzero().squeeze(1)
    all_QM = torch.cat([score_QK[hot_Q], score_QN[hot_Q]], dim=1)
    ids_QM = torch.cat([id_QK[hot_Q], id_N.expand(len(hot_Q), -1)], dim=1)
    sorted_QM, place_QM = all_QM.sort(dim=1, descending=True, stable=True)
    score_QK[hot_Q] = sorted_QM[:, :K]
    id_QK[hot_Q] = ids_QM.gather(1, place_QM[:, :K])


def _merge(score_QK: Tensor, id_QK: Tensor, world: int) -> np.ndarray:
    """The passage ids of the best of all workers' lists, (Q, K)."""
    counts_W = [len(id_QK)] * world
    scores, ids = (gather_rows(x, counts_W).cpu().numpy().reshape(world, -1, K) for x in (score_QK, id_QK))
    return topk.merge(list(zip(scores, ids, strict=True)), K)[1]


@contextmanager
def _said_in_log() -> Iterator[None]:
    """What goes wrong in the block goes no further."""
    try:
        yield
    except Exception:
        traceback.print_exc()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and afterwards each module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
