"""Sampling of passages, token ids and the other fields of a step's batch."""

from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raybge.data.collate import GroupTokenizer, draw, shuffle_parts, unpack
from raybge.data.groups import Group, text_key
from raybge.data.jsonl import Row
from raybge.data.mixture import generator
from raybge.data.prompts import Instructions
from raybge.data.tokenize import TextTokenizer

WORDS = ["[UNK]", "ask", "say", "a", "b", "c", "d", "e", "q"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def group(pos=("a",), neg=(), prompt=None, **scores):
    return Group("q", pos, neg, prompt, **scores)


def drawn(positives, negatives, size, *seed):
    return draw(positives, negatives, size, generator("test", *seed))


def words(ids):
    return [WORDS[i] for i in ids]


def test_a_sample_depends_on_its_seed_only():
    assert drawn(3, 7, 4, 1, 2, 3) == drawn(3, 7, 4, 1, 2, 3)
    assert len({str(drawn(3, 7, 4, 1, epoch, 3)) for epoch in range(20)}) > 10


def test_one_positive_then_distinct_negatives():
    for seed in range(50):
        positive, negatives = drawn(2, 5, 5, seed)
        assert positive in range(2)
        assert len(set(negatives)) == 4 and set(negatives) <= set(range(5))


def test_positives_and_negatives_are_sampled_uniformly():
    """2,000 samples of 1 of 4 and 2 of 5: within 5 standard deviations of uniform."""
    draws = [drawn(4, 5, 3, seed) for seed in range(2000)]
    first, rest = Counter(d[0] for d in draws), Counter(n for d in draws for n in d[1])
    assert all(abs(first[c] - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75) for c in range(4))
    assert all(abs(rest[c] - 800) < 5 * np.sqrt(2000 * 0.4 * 0.6) for c in range(5))


def test_a_negative_is_repeated_only_after_all_are_used():
    assert sorted(Counter(drawn(1, 3, 9, 5)[1]).values()) == [2, 3, 3]


def test_without_negatives_only_the_positive_is_sampled():
    assert drawn(1, 0, 8, 0) == (0, [])


def make(tokenizer, size=3, instructions=None, query=2, passage=4, **more):
    texts = TextTokenizer(tokenizer, instructions or Instructions(), query, passage)
    return GroupTokenizer(texts, size, seed=0, **more)


def test_a_batch_has_token_ids(tokenizer):
    rows = [
        Row(0, 10, 1, {}, group(("a b c d e",), ("b", "c"))),
        Row(1, 20, 1, {}, group(("d",), (), "say ")),
    ]
    batch = unpack(make(tokenizer, instructions=Instructions(query="ask ", passage="say "))(0, 7, rows))
    texts = [words(ids) for ids in batch.token_ids]
    assert batch.step == 7
    assert batch.rows == [(0, 10), (1, 20)]
    assert batch.groups.passages_B.tolist() == [3, 1]
    # the row's own prompt stands before the flag's instruction
    assert texts[:2] == [["ask", "q"], ["say", "q"]]
    assert texts[2] == ["say", "a", "b", "c"]  # cut to 4
    assert sorted(texts[3:5]) == [["say", "b"], ["say", "c"]]
    assert texts[5] == ["say", "d"]
    assert batch.groups.teacher_score_M is None and batch.guide_ids is None


def test_an_empty_batch_stays_empty(tokenizer):
    guide = TextTokenizer(tokenizer, Instructions(), 8, 8)
    batch = unpack(make(tokenizer, scored=True, guide=guide)(0, 3, []))
    assert (batch.step, batch.rows, batch.token_ids, batch.guide_ids) == (3, [], [], [])
    for name in ("passages_B", "passage_key_M", "query_key_B", "known_B", "known_key_R", "alone_B", "teacher_score_M"):
        assert getattr(batch.groups, name).shape == (0,)
    assert batch.groups.alone_B.dtype == bool and batch.groups.teacher_score_M.dtype == np.float32


def key(text):
    return np.frombuffer(text_key(text)[:8], "<i8")[0]


def test_keys_ignore_instructions(tokenizer):
    """Keys of the sampled passages, and of all positives of the row."""
    rows = [Row(0, 0, 1, {}, group(("a", "b"), ("c", "d"))), Row(0, 9, 1, {}, group(("e",)))]
    batch = unpack(make(tokenizer, instructions=Instructions(passage="say "), passage=9)(0, 0, rows))
    texts = [words(ids)[1:] for ids in batch.token_ids[2:]]
    assert batch.groups.passage_key_M.tolist() == [key(" ".join(text)) for text in texts]
    assert batch.groups.passage_key_M.dtype == batch.groups.known_key_R.dtype == np.int64
    assert batch.groups.known_B.tolist() == [2, 1]
    assert batch.groups.known_key_R.tolist() == [key("a"), key("b"), key("e")]
    assert batch.groups.query_key_B.tolist() == [key("q")] * 2


def test_queries_of_some_files_use_their_own_group_only(tokenizer):
    rows = [Row(file, 0, 1, {}, group()) for file in (2, 0, 1)]
    assert unpack(make(tokenizer, alone=frozenset({1, 2}))(0, 0, rows)).groups.alone_B.tolist() == [True, False, True]


def test_teacher_scores_follow_the_sampled_passages(tokenizer):
    scores = {"a": 1.5, "b": -2.0, "c": 3.25, "d": 0.5, "e": 7.0}
    some = group(("a", "b"), ("c", "d", "e"), pos_scores=(1.5, -2.0), neg_scores=(3.25, 0.5, 7.0))
    for epoch in range(8):
        batch = unpack(make(tokenizer, size=6, scored=True)(epoch, 0, [Row(0, 0, 1, {}, some)]))
        assert batch.groups.teacher_score_M.tolist() == [scores[words(ids)[0]] for ids in batch.token_ids[1:]]
        assert len(batch.groups.teacher_score_M) == 6


def test_a_guide_model_tokenizes_the_same_texts(tokenizer):
    guide = TextTokenizer(tokenizer, Instructions(query="say "), 9, 2)
    rows = [Row(0, 0, 1, {}, group(("a b c d e",), ("b c d", "c d e")))]
    batch = unpack(make(tokenizer, passage=9, guide=guide)(0, 0, rows))
    assert [words(ids) for ids in batch.guide_ids[:1]] == [["say", "q"]]
    assert [ids.tolist() for ids in batch.guide_ids[1:]] == [ids[:2].tolist() for ids in batch.token_ids[1:]]


def test_each_copy_of_a_row_samples_other_passages(tokenizer):
    rows = [Row(0, 0, 1, {}, group(tuple("abcde")))] * 40
    tokenize = make(tokenizer)
    same, fresh = (unpack(tokenize(0, 0, rows, copies)).groups.passage_key_M for copies in (None, range(40)))
    assert len(set(same)) == 1
    assert len(set(fresh)) == 5


# --- shuffle_ratio ----------------------------------------------------------------------------------------------------


def test_a_share_of_long_texts_has_its_thirds_shuffled():
    text = "".join(chr(ord("a") + i // 5) for i in range(101))
    thirds = {text[:34], text[34:68], text[68:]}
    shuffled = [shuffle_parts(text, 0.25, generator("test", seed)) for seed in range(2000)]
    shuffled = [each for each in shuffled if each != text]
    assert all(set(each.split(" ")) == thirds for each in shuffled)
    assert len(set(shuffled)) == 6  # every order, the old one too, then with the spaces that the recipe puts in
    assert abs(len(shuffled) - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_short_texts_and_a_ratio_of_0_change_nothing():
    assert shuffle_parts("x" * 100, 1.0, generator("test", 0)) == "x" * 100
    assert shuffle_parts("x" * 101, 0.0, generator("test", 0)) == "x" * 101
    assert shuffle_parts("x" * 101, 1.0, generator("test", 0)) != "x" * 101


def test_only_the_positive_is_shuffled_and_keeps_its_key(tokenizer):
    long = " ".join("a" * 50 + "b" * 50 + "c" * 50)
    rows = [Row(0, at, 1, {}, group((long,), (long, "b"))) for at in range(20)]
    plain = unpack(make(tokenizer, passage=400)(0, 0, rows))
    batch = unpack(make(tokenizer, passage=400, shuffle_ratio=0.5)(0, 0, rows))
    again = unpack(make(tokenizer, passage=400, shuffle_ratio=0.5)(0, 0, rows))
    other = unpack(make(tokenizer, passage=400, shuffle_ratio=0.5)(1, 0, rows))

    def positives(batch):
        return [tuple(ids) for ids in batch.token_ids[20::3]]

    changed = [a != b for a, b in zip(positives(batch), positives(plain), strict=True)]
    assert 4 < sum(changed) < 16
    assert positives(batch) == positives(again) != positives(other)
    negatives = [i for i in range(20, 80) if (i - 20) % 3]
    assert all((batch.token_ids[i] == plain.token_ids[i]).all() for i in negatives)
    assert (batch.groups.passage_key_M == plain.groups.passage_key_M).all()
