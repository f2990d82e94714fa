"""Shards against one exact numpy search over the whole pool, ties and truncated lists included."""

import types

import numpy as np
import pyarrow as pa
import pytest

from raybge.data.groups import text_key
from raybge.errors import UserError
from raybge.search import shards, topk
from raybge.search.shards import Host, Shard, check_gpu_search, keys_of, words_of


def table_of(vectors_PD, texts, known=None):
    """A block as it comes from the encoding actors."""
    known = [[text] for text in texts] if known is None else known
    ends = np.cumsum([0] + [2 * len(each) for each in known])
    words = words_of([text_key(text) for each in known for text in each])
    flat = pa.array(np.asarray(vectors_PD, np.float32).ravel())
    return pa.table(
        {
            "text": pa.array(texts, pa.large_string()),
            "known": pa.LargeListArray.from_arrays(pa.array(ends, pa.int64()), pa.array(words.ravel(), pa.uint64())),
            "vector": pa.FixedSizeListArray.from_arrays(flat, len(vectors_PD[0])),
        }
    )


def whole_numbers(rows, dim=4, seed=0):
    """Vectors whose inner products are exact in float32 and tie all the time."""
    return np.random.default_rng(seed).integers(-1, 2, (rows, dim)).astype(np.float32)


def exact(q_QD, p_PD, k):
    scores_QP = q_QD @ p_PD.T
    ids_QP = np.broadcast_to(np.arange(len(p_PD)), scores_QP.shape)
    order_QP = np.lexsort((ids_QP, -scores_QP), axis=1)[:, :k]
    return np.take_along_axis(scores_QP, order_QP, axis=1), order_QP


def held(p_PD, texts, shard_size, hosts=1, block=97):
    """The pool in shards, from blocks that do not end where shards do."""
    made = [Host(shard_size, 2, False) for _ in range(hosts)]
    for start in range(0, len(p_PD), block):
        table = table_of(p_PD[start : start + block], texts[start : start + block])
        for number in range(start // shard_size, (start + len(table) - 1) // shard_size + 1):
            first, last = number * shard_size - start, (number + 1) * shard_size - start
            made[number % hosts].add(number, table, max(first, 0), min(last, len(table)))
    assert sum(host.seal() for host in made) == len(p_PD)
    return made


@pytest.mark.parametrize("k", [1, 10, 200, 500])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_give_the_one_exact_search(count, k):
    p_PD, q_QD = whole_numbers(500), whole_numbers(70, seed=1)
    texts = [f"passage {i}" for i in range(500)]
    hosts = held(p_PD, texts, -(-500 // count), hosts=min(count, 2))
    found = [host.search(table_of(q_QD, [""] * 70, [[]] * 70), k, 16) for host in hosts]
    scores, ids = topk.merge([(s, i) for s, i, _ in found], k)
    expected_scores, expected_ids = exact(q_QD, p_PD, k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)


def test_random_unit_vectors_equal_numpy_in_any_number_of_shards():
    rng = np.random.default_rng(3)
    p_PD, q_QD = (rng.standard_normal((n, 32)).astype(np.float32) for n in (600, 40))
    p_PD, q_QD = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (p_PD, q_QD))
    _, expected = exact(q_QD, p_PD, 50)
    for size in (600, 300, 120):
        host = held(p_PD, [str(i) for i in range(600)], size)[0]
        scores, ids, _ = host.search(table_of(q_QD, [""] * 40, [[]] * 40), 50, 64)
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_allclose(scores, np.take_along_axis(q_QD @ p_PD.T, ids, axis=1), atol=1e-6)


def test_a_group_of_ties_is_cut_by_passage_id():
    shard = Shard(1000, 2)
    vectors = np.zeros((400, 2), np.float32)
    vectors[:, 0] = 1  # all alike, as truncated texts can be
    shard.add(vectors, np.zeros((400, 2), np.uint64), pa.array([""] * 400, pa.large_string()))
    _, ids = shard.search(np.array([[1, 0]] * 30, np.float32), 5)
    assert ids.tolist() == [[1000, 1001, 1002, 1003, 1004]] * 30


def test_lists_are_as_long_as_the_shard_at_most():
    host = held(whole_numbers(3), ["a", "b", "c"], 10)[0]
    scores, ids, _ = host.search(table_of(whole_numbers(2), ["", ""], [[], []]), 5, 1)
    assert sorted(ids[0].tolist()) == [-1, -1, 0, 1, 2] and np.isneginf(scores[:, 3:]).all()


def test_the_search_batch_is_what_is_searched_at_a_time(monkeypatch):
    sizes: list[int] = []
    search = Shard.search

    def noted(self, q_QD, k):
        sizes.append(len(q_QD))
        return search(self, q_QD, k)

    monkeypatch.setattr(Shard, "search", noted)
    host = held(whole_numbers(50), [str(i) for i in range(50)], 50)[0]
    host.search(table_of(whole_numbers(10), [""] * 10, [[]] * 10), 3, 4)
    assert sorted(sizes) == [2, 4, 4]


def test_known_keys_and_texts_are_found_in_their_shards():
    texts = [f"text {i} żółw" for i in range(30)]
    host = held(whole_numbers(30), texts, 7)[0]
    known = [["text 8 żółw", "nowhere"], [], ["text 29 żółw"]]
    _, _, found = host.search(table_of(whole_numbers(3), [""] * 3, known), 2, 8)
    assert found.tolist() == [8, -1, 29]
    assert keys_of(table_of(whole_numbers(3), [""] * 3, known))[1].tolist() == [2, 0, 1]
    assert host.texts(np.array([29, 0, 8])) == [texts[29], texts[0], texts[8]]


def test_keys_that_share_their_first_half_are_told_apart():
    keys = np.array([[7, 3], [7, 1], [9, 1], [7, 2]], np.uint64)
    shard = Shard(10, 1)
    shard.add(np.ones((4, 1), np.float32), keys, pa.array(list("abcd"), pa.large_string()))
    shard.seal()
    asked = np.array([[7, 2], [7, 1], [7, 9], [9, 1], [8, 1], [10, 0]], np.uint64)
    assert shard.find(asked).tolist() == [13, 11, -1, 12, -1, -1]


def test_searching_on_a_gpu_that_is_not_there_says_what_to_do(monkeypatch):
    import sys

    faiss_cpu, faiss_gpu = types.SimpleNamespace(), types.SimpleNamespace(GpuIndexFlatIP=None)
    monkeypatch.setitem(sys.modules, "faiss", faiss_cpu)
    with pytest.raises(UserError, match=r"--use_gpu_for_searching.*faiss-cpu.*extra `gpu`"):
        check_gpu_search(1)
    monkeypatch.setitem(sys.modules, "faiss", faiss_gpu)
    with pytest.raises(UserError, match=r"--use_gpu_for_searching.*no GPU"):
        check_gpu_search(0)
    check_gpu_search(1)


def test_a_shard_keeps_nothing_of_what_it_was_handed():
    texts = pa.array(["a long text"], pa.large_string())
    keys = np.array([[1, 2]], np.uint64)
    shard = Shard(0, 1)
    shard.add(np.ones((1, 1), np.float32), keys, texts)
    keys[:] = 0
    assert shard._text_parts[-1].buffers()[2].address != texts.buffers()[2].address
    shard.seal()
    assert shard.find(np.array([[1, 2]], np.uint64)).tolist() == [0]
    assert shards.GPU_MOST == 2048
