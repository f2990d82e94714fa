"""Drawing passages, instructions and tokens of a step's share."""

from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raybge.data.collate import GroupTokenizer, draw, unpack
from raybge.data.groups import Group
from raybge.data.jsonl import Row
from raybge.model.folder import Instructions

WORDS = ["[UNK]", "ask", "say", "a", "b", "c", "d", "e", "q"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def group(pos=("a",), neg=(), prompt=None):
    return Group("q", pos, neg, prompt)


def test_a_draw_depends_on_its_seed_alone():
    g = group(("a", "b", "c"), tuple("defghij"))
    assert draw(g, 4, (1, 2, 3)) == draw(g, 4, (1, 2, 3))
    assert len({tuple(draw(g, 4, (1, epoch, 3))) for epoch in range(20)}) > 10


def test_one_positive_first_then_distinct_negatives():
    g = group(("a", "b"), tuple("cdefg"))
    for seed in range(50):
        positive, *negatives = draw(g, 5, (seed,))
        assert positive in g.pos
        assert set(negatives) <= set(g.neg)
        assert len(set(negatives)) == 4


def test_positives_and_negatives_are_drawn_evenly():
    """2,000 draws of 1 of 4 and 2 of 5: within 5 standard deviations of even."""
    drawn = [draw(group(tuple("abcd"), tuple("vwxyz")), 3, (seed,)) for seed in range(2000)]
    first, rest = Counter(d[0] for d in drawn), Counter(n for d in drawn for n in d[1:])
    assert all(abs(first[c] - 500) < 5 * np.sqrt(2000 * 0.25 * 0.75) for c in "abcd")
    assert all(abs(rest[c] - 800) < 5 * np.sqrt(2000 * 0.4 * 0.6) for c in "vwxyz")


def test_a_negative_comes_twice_only_after_all_have_come():
    counts = Counter(draw(group(neg=("x", "y", "z")), 9, (5,))[1:])
    assert sorted(counts.values()) == [2, 3, 3]


def test_no_negatives_give_the_positive_alone():
    assert draw(group(), 8, (0,)) == ["a"]


def test_a_share_becomes_token_ids(tokenizer):
    instructions = Instructions(query="ask ", passage="say ")
    tokenize = GroupTokenizer(tokenizer, instructions, group_size=3, query_max_len=2, passage_max_len=4, seed=0)
    rows = [
        Row(0, 10, 1, {}, group(("a b c d e",), ("b", "c"))),
        Row(1, 20, 1, {}, group(("d",), (), "say ")),
    ]
    batch = unpack(tokenize(0, 7, rows))
    texts = [[WORDS[i] for i in ids] for ids in batch.token_ids]
    assert batch.step == 7
    assert batch.rows == [(0, 10), (1, 20)]
    assert batch.passages_B.tolist() == [3, 1]
    assert texts[:2] == [
        ["ask", "q"],
        ["say", "q"],
    ]  # the row's own prompt stands before the flag's instruction
    assert texts[2] == ["say", "a", "b", "c"]  # cut to 4
    assert sorted(texts[3:5]) == [["say", "b"], ["say", "c"]]
    assert texts[5] == ["say", "d"]


def test_an_empty_share_stays_empty(tokenizer):
    batch = unpack(GroupTokenizer(tokenizer, Instructions(), 2, 8, 8, 0)(0, 3, []))
    assert (batch.step, batch.rows, batch.token_ids, batch.passages_B.tolist()) == (3, [], [], [])
