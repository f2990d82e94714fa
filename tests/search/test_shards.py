"""Shards against one exact numpy search over the whole pool, including ties and short lists."""

import math
import types

import faiss
import numpy as np
import pyarrow as pa
import pytest

from raybge.data.groups import text_key
from raybge.search import topk
from raybge.search.faiss_index import GPU_MAX_CANDIDATES, IndexKind, check_factory, check_gpu_search
from raybge.search.index import shard_layout
from raybge.search.key_table import KeyTable, key_words
from raybge.search.shards import BlockSlice, KnownPassages, Shard, ShardSearcher
from raybge.search.store import EncodedBlock, Store
from raybge.util.errors import UserError


def table_of(vectors_PD, texts, known=None):
    """Return a block as the encoding actors write it."""
    known = [[text] for text in texts] if known is None else known
    ends = np.cumsum([0] + [2 * len(each) for each in known])
    words = key_words([text_key(text) for each in known for text in each])
    flat = pa.array(np.asarray(vectors_PD, np.float32).ravel())
    return pa.table(
        {
            "text": pa.array(texts, pa.large_string()),
            "known": pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(words.ravel(), pa.uint64())),
            "vector": pa.FixedSizeListArray.from_arrays(flat, len(vectors_PD[0])),
        }
    )


def whole_numbers(rows, dim=4, seed=0):
    """Return vectors whose inner products are exact in float32 and often tie."""
    return np.random.default_rng(seed).integers(-1, 2, (rows, dim)).astype(np.float32)


def unit(rows, dim, seed):
    x = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def exact(q_QD, p_PD, k):
    scores_QP = q_QD @ p_PD.T
    ids_QP = np.broadcast_to(np.arange(len(p_PD)), scores_QP.shape)
    order_QP = np.lexsort((ids_QP, -scores_QP), axis=1)[:, :k]
    return np.take_along_axis(scores_QP, order_QP, axis=1), order_QP


class Pool:
    """A pool in a store, in blocks that do not align with shards, and its searchers."""

    def __init__(
        self, folder, p_PD, texts=None, shard_size=1000, searchers=1, resident=100, block=97, kind=None, threads=2
    ):
        texts = [str(i) for i in range(len(p_PD))] if texts is None else texts
        self.store = Store(str(folder))
        self.blocks = []
        for start in range(0, len(p_PD), block):
            table = table_of(p_PD[start : start + block], texts[start : start + block])
            self.store.write_table(f"p{start}", table)
            self.blocks.append(EncodedBlock(f"p{start}", len(table)))
        shards = dict(enumerate(shard_layout(self.blocks, shard_size)))
        self.passes = math.ceil(math.ceil(len(shards) / searchers) / resident)
        self.searchers = [
            ShardSearcher(
                self.store,
                {number: parts for number, parts in shards.items() if number % searchers == searcher},
                shard_size,
                resident,
                kind or IndexKind(),
                threads,
            )
            for searcher in range(searchers)
        ]

    def search(self, q_QD, k, batch=16, known=None):
        self.store.write_table("queries", table_of(q_QD, [""] * len(q_QD), known or [[]] * len(q_QD)))
        lists = [
            searcher.search(number, "queries", k, batch) for number in range(self.passes) for searcher in self.searchers
        ]
        return topk.merge(lists, k)


@pytest.mark.parametrize("k", [1, 10, 200, 500])
@pytest.mark.parametrize(("count", "resident"), [(1, 1), (2, 9), (5, 9), (5, 1), (5, 2)])
def test_shards_equal_one_exact_search(tmp_path, count, resident, k):
    p_PD, q_QD = whole_numbers(500), whole_numbers(70, seed=1)
    pool = Pool(tmp_path, p_PD, shard_size=-(-500 // count), searchers=min(count, 2), resident=resident)
    scores, ids = pool.search(q_QD, k)
    expected_scores, expected_ids = exact(q_QD, p_PD, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)
    assert pool.passes == {(1, 1): 1, (2, 9): 1, (5, 9): 1, (5, 1): 3, (5, 2): 2}[count, resident]


def test_any_number_of_shards_equals_one_index(tmp_path):
    """200,000 vectors in 1, 2, 5 and 16 shards, on 1 and 3 searchers, against one faiss index."""
    p_PD, q_QD = unit(200_000, 384, 0), unit(128, 384, 1)
    whole = faiss.IndexFlatIP(384)
    whole.add(p_PD)
    expected_scores, expected = whole.search(q_QD, 100)
    ties = np.abs(np.diff(expected_scores, axis=1)) < 1e-6
    for count, searchers in ((1, 1), (2, 1), (5, 3), (16, 3)):
        pool = Pool(tmp_path, p_PD, shard_size=-(-200_000 // count), searchers=searchers, block=9_973)
        scores, ids = pool.search(q_QD, 100, batch=64)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
        differs = ids != expected
        assert differs.sum() <= 2 * ties.sum()
        assert all(set(a) ^ set(b) <= {a[-1], b[-1]} for a, b in zip(ids, expected, strict=True))


def test_score_bits_do_not_depend_on_threads(tmp_path):
    p_PD, q_QD = unit(3000, 48, 0), unit(200, 48, 1)
    results = [
        Pool(tmp_path / str(n), p_PD, threads=n, searchers=h).search(q_QD, 20, 64) for n, h in ((1, 1), (4, 1), (2, 3))
    ]
    for scores, ids in results[1:]:
        assert scores.tobytes() == results[0][0].tobytes() and (ids == results[0][1]).all()


def test_ties_are_cut_by_passage_id(tmp_path):
    vectors = np.zeros((400, 2), np.float32)
    vectors[:, 0] = 1  # all equal, as truncated texts can be
    Pool(tmp_path, vectors, [""] * 400, block=400)
    shard = Shard(1000, Store(str(tmp_path)), [BlockSlice("p0", 0, 400)])
    shard.load(IndexKind())
    _, ids = shard.search(np.array([[1, 0]] * 30, np.float32), 5)
    assert ids.tolist() == [[1000, 1001, 1002, 1003, 1004]] * 30


def test_lists_are_at_most_as_long_as_the_shard(tmp_path):
    scores, ids = Pool(tmp_path, whole_numbers(3), ["a", "b", "c"]).search(whole_numbers(2), 5)
    assert sorted(ids[0].tolist()) == [-1, -1, 0, 1, 2] and np.isneginf(scores[:, 3:]).all()


def test_search_batch_size_is_respected(tmp_path, monkeypatch):
    sizes: list[int] = []
    search = Shard.search

    def recorded(self, q_QD, k):
        sizes.append(len(q_QD))
        return search(self, q_QD, k)

    monkeypatch.setattr(Shard, "search", recorded)
    Pool(tmp_path, whole_numbers(50)).search(whole_numbers(10), 3, batch=4)
    assert sorted(sizes) == [2, 4, 4]


def test_only_one_pass_is_in_memory(tmp_path):
    pool = Pool(tmp_path, whole_numbers(50), shard_size=10, resident=2)
    pool.search(whole_numbers(3), 3)
    (searcher,) = pool.searchers
    assert [shard._index is not None for shard in searcher._shards.values()] == [False] * 4 + [True]


def test_known_passages_texts_and_scores(tmp_path):
    texts = [f"text {i} żółw" for i in range(30)]
    texts[20] = texts[8]  # two passages may share a key
    p_PD, q_QD = unit(30, 4, 0), unit(3, 4, 1)
    pool = Pool(tmp_path, p_PD, texts, shard_size=7, searchers=2, block=11)
    pool.search(q_QD, 2, known=[["nowhere", "text 8 żółw"], [], ["text 29 żółw"]])
    known = KnownPassages.concatenate([searcher.known("queries") for searcher in pool.searchers])
    assert known.key_M.tolist() == [1, 1, 2] and known.id_M.tolist() == [8, 20, 29]
    np.testing.assert_allclose(known.score_M, [q_QD[0] @ p_PD[8], q_QD[0] @ p_PD[20], q_QD[2] @ p_PD[29]], atol=1e-6)
    first = pool.searchers[0]  # shards 0, 2 and 4
    ids = np.array([29, 0, 20, 0, 3])
    assert first.texts(ids) == [texts[i] for i in ids]
    q_ND = unit(5, 4, 2)
    np.testing.assert_allclose(first.scores(q_ND, ids), (q_ND * p_PD[ids]).sum(axis=1), atol=1e-6)


def test_keys_with_equal_first_half_are_distinguished():
    table = KeyTable(np.array([[7, 3], [7, 1], [9, 1], [7, 2], [9, 1]], np.uint64))
    keys = np.array([[7, 2], [7, 1], [7, 9], [9, 1], [8, 1], [10, 0]], np.uint64)
    place, row = table.find(keys)
    assert list(zip(place.tolist(), row.tolist(), strict=True)) == [(0, 3), (1, 1), (3, 2), (3, 4)]
    assert table.find_one(keys[[0, 2, 1]]).tolist() == [3, -1, 1]
    assert KeyTable(np.zeros((0, 2), np.uint64)).find_one(keys).tolist() == [-1] * 6


# --- approximate indexes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["IVF8,Flat", "HNSW16", "PQ4x4", "OPQ4,IVF4,PQ4x4", "SQ8"])
def test_approximate_index_does_not_depend_on_searchers(tmp_path, factory):
    p_PD, q_QD = unit(1500, 16, 0), unit(30, 16, 1)
    results = []
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        pool = Pool(folder, p_PD, shard_size=500, searchers=count, kind=IndexKind(factory), threads=count)
        results.append(pool.search(q_QD, 10))
    for scores, ids in results[1:]:
        assert (ids == results[0][1]).all() and scores.tobytes() == results[0][0].tobytes()
    _, expected = exact(q_QD, p_PD, 10)
    share = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(results[0][1], expected, strict=True)])
    assert share > 0.1 and (share < 1 or factory in ("HNSW16", "SQ8"))


def test_search_exactly_with_an_approximate_index(tmp_path):
    p_PD, q_QD = unit(700, 16, 0), unit(20, 16, 1)
    pool = Pool(tmp_path, p_PD, shard_size=200, kind=IndexKind("IVF8,Flat"))
    _, ids = topk.merge([searcher.search_exactly(q_QD, 9) for searcher in pool.searchers], 9)
    np.testing.assert_array_equal(ids, exact(q_QD, p_PD, 9)[1])


def test_invalid_factory_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--index_factory Flta: faiss cannot build this index \(could not parse"):
        check_factory("Flta", None)
    with pytest.raises(UserError, match=r"--index_factory PQ7: faiss cannot build this index \(The dimension"):
        check_factory("PQ7", 384)
    check_factory("PQ7", None)
    check_factory("OPQ16_64,IVF1024,PQ16", 384)


def test_shard_too_small_to_train_is_searched_exactly(tmp_path):
    """The last of three shards has 20 passages, fewer than the index has cells."""
    p_PD, q_QD = unit(220, 4, 0), unit(30, 4, 1)
    _, ids = Pool(tmp_path, p_PD, shard_size=100, kind=IndexKind("IVF64,Flat")).search(q_QD, 220)
    assert all(set(range(200, 220)) <= set(row) for row in ids.tolist())


# --- on a GPU ---------------------------------------------------------------------------------------------


def test_missing_gpu_is_named(monkeypatch):
    import sys

    faiss_cpu, faiss_gpu = types.SimpleNamespace(), types.SimpleNamespace(GpuIndexFlatIP=None)
    monkeypatch.setitem(sys.modules, "faiss", faiss_cpu)
    with pytest.raises(UserError, match=r"--use_gpu_for_searching.*faiss-cpu.*extra `gpu`"):
        check_gpu_search(1)
    monkeypatch.setitem(sys.modules, "faiss", faiss_gpu)
    with pytest.raises(UserError, match=r"--use_gpu_for_searching.*no GPU"):
        check_gpu_search(0)
    check_gpu_search(1)
    assert GPU_MAX_CANDIDATES == 2048
