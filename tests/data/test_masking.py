"""Masks against their definition: whole words in random order while they fit the budget."""

import itertools
from collections import Counter

import numpy as np
import pytest
import tokenizers
import transformers
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from raybge.data import tokenize as tokens_module
from raybge.data.jsonl import Row
from raybge.data.masking import CHOICES, LONGEST_WORD, TextMasker, draw_words, number_words, unpack_masked
from raybge.data.mixture import generator
from raybge.util.errors import UserError

TEXT = "what is a lane, or a row? we read block after block... of the text that we sort by length in chunks on 1 node"
CHINESE = "我们把文本分成块然后按长度排序这样每个节点都能很快地读完所有的行"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, "lane", "row", "##s", "##ing", "a", "of", "block", *".,?!"]


def framed(core, mask="[MASK]", **more):
    """Return the tokenizer with [CLS] and [SEP] around a text."""
    first, last = core.token_to_id("[CLS]"), core.token_to_id("[SEP]")
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", first), ("[SEP]", last)]
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, mask_token=mask, **names, **more)


def pieces(words=PIECES, **more):
    """Return a BERT tokenizer with its own vocabulary."""
    core = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = tokenizers.normalizers.BertNormalizer()
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return framed(core, **more)


def trained(kind: str):
    """Return a small tokenizer like RoBERTa's or XLM-R's."""
    if kind == "roberta":
        core = tokenizers.Tokenizer(tokenizers.models.BPE())
        core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL)
    else:
        core = tokenizers.Tokenizer(tokenizers.models.Unigram())
        core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="[UNK]")
    core.train_from_iterator([TEXT, CHINESE, *CHINESE] * 20, trainer)
    return framed(core)


def masker(tokenizer=None, length=64, seed=0, **shares):
    return TextMasker(tokenizer or pieces(), length, seed, **shares)


def rows_of(texts):
    return [Row(0, 10 * i, i + 1, {}, text) for i, text in enumerate(texts)]


def masked(texts, epoch=0, copies=None, **how):
    return unpack_masked(masker(**how)(epoch, 0, rows_of(texts), copies)).texts


def hidden(text):
    """Return the masks unpacked, (R, T) bool."""
    return np.unpackbits(text.visible_RS, axis=1)[:, : len(text.token_T)] == 0


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


# --- choices of words -------------------------------------------------------------------------------------------------


def by_definition(sizes, budget):
    """Return the probability of each set of words by enumerating all orders."""
    result = Counter()
    for order in itertools.permutations(range(len(sizes))):
        left, chosen = budget, set()
        for word in order:
            if sizes[word] <= left:
                chosen.add(word)
                left -= sizes[word]
        result[frozenset(chosen)] += 1
    return {chosen: times / result.total() for chosen, times in result.items()}


@pytest.mark.parametrize(
    "sizes, budget",
    [
        ([1, 1, 1, 1, 1], 2),
        ([1, 2, 3, 1, 4, 1], 5),  # words that do not fit are passed over, and later ones taken
        ([3, 2, 2, 3], 4),
        ([2, 5, 3], 4),  # one never fits
        ([1, 2, 2], 9),
        ([2], 1),
        ([1], 1),
    ],
)
def test_choices_have_the_probabilities_of_the_definition(sizes, budget):
    """20,000 choices: each set within 5 standard deviations of its probability, and no other set."""
    times = 20_000
    drawn = draw_words(np.array(sizes), np.full(times, budget), generator("test", 1))
    result = Counter(frozenset(np.flatnonzero(chosen).tolist()) for chosen in drawn)
    expected = by_definition(sizes, budget)
    assert result.keys() == expected.keys()
    for chosen, share in expected.items():
        assert abs(result[chosen] - times * share) <= 5 * np.sqrt(times * share * (1 - share))


def test_many_words_fill_the_budget_evenly():
    """500 words of 1 to 4 tokens: single tokens fill the budget; words of one size are chosen equally often."""
    sizes = generator("test", 2).integers(1, 5, 500)
    drawn = draw_words(sizes, np.full(2000, 300), generator("test", 3))
    assert (drawn @ sizes == 300).all()
    for size in range(1, 5):
        times = drawn[:, sizes == size].sum(axis=0)
        share = times.mean() / 2000
        assert np.abs(times - times.mean()).max() < 5 * np.sqrt(2000 * share * (1 - share))
    assert len(np.unique(drawn, axis=0)) == 2000


def test_a_text_without_words_has_empty_choices():
    assert draw_words(np.zeros(0, np.int64), np.ones(3, np.int64), generator("test", 0)).shape == (3, 0)


# --- words ------------------------------------------------------------------------------------------------------------


def words_of(tokenizer, text):
    [(ids, word_T)] = masker(tokenizer).tokenize([text])
    names = tokenizer.convert_ids_to_tokens(ids.tolist())
    return [[n for n, w in zip(names, word_T, strict=True) if w == word] for word in range(word_T.max() + 1)]


def test_pieces_form_one_word():
    assert words_of(pieces(), "lanesing, a row!") == [["lane", "##s", "##ing"], [","], ["a"], ["row"], ["!"]]
    assert words_of(pieces(), "nowhere lanes") == [["[UNK]"], ["lane", "##s"]]


def test_slow_tokenizers_have_the_words_of_fast_ones(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    assert not slow.is_fast
    for text in ("lanesing, a row!", "nowhere lanes", "...", "rows " * 90):
        (slow_ids, slow_T), (ids, word_T) = (masker(t).tokenize([text])[0] for t in (slow, pieces()))
        assert slow_ids.tolist() == ids.tolist()
        assert slow_T.tolist() == word_T.tolist()


@pytest.mark.parametrize("kind", ["roberta", "xlm-r"])
def test_words_of_other_tokenizers_end_at_white_space(kind):
    result = words_of(trained(kind), "we read rows of text")
    texts = ["".join(word).strip("Ġ▁") for word in result]
    assert texts == ["we", "read", "rows", "of", "text"]
    assert max(map(len, result)) > 1


def test_a_sentence_without_spaces_is_masked_by_token():
    """Chinese: one word per character for BERT; tokens for XLM-R, where all of it would be one word."""
    assert all(len(word) == 1 for word in words_of(pieces([*PIECES, *dict.fromkeys(CHINESE)]), CHINESE))
    result = words_of(trained("xlm-r"), f"{CHINESE} {CHINESE[:2]}")
    assert len(result) > len(CHINESE) / 2 and all(len(word) == 1 for word in result[:-1])


def test_words_are_numbered_and_long_words_split():
    nan = np.nan
    marks = [nan, 7, 7, 9, *[11] * (LONGEST_WORD + 1), 12, nan, 12]
    expected = [-1, 0, 0, 1, *range(2, LONGEST_WORD + 3), LONGEST_WORD + 3, -1, LONGEST_WORD + 4]
    assert number_words(np.array(marks)).tolist() == expected
    assert number_words(np.array([nan, *[3] * LONGEST_WORD, nan])).tolist() == [-1, *[0] * LONGEST_WORD, -1]


def test_tokens_are_those_of_transformers():
    texts = [TEXT, "lanes", "...", CHINESE, "rows of a lane " * 3000]
    for tokenizer in (pieces(), trained("roberta"), trained("xlm-r")):
        for side in ("right", "left"):
            tokenizer.truncation_side = side
            result = masker(tokenizer, 24).tokenize(texts)
            expected = [tokenizer(text, truncation=True, max_length=24)["input_ids"] for text in texts]
            assert [ids.tolist() for ids, _ in result] == expected


# --- texts ------------------------------------------------------------------------------------------------------------

TEXTS = ["lanesing of rows, a block. " * n for n in range(1, 9)]


@pytest.fixture(scope="module")
def many():
    """Return 2,000 masked texts of 64 tokens."""
    return masked(["lanesing of rows, a block. " * 9] * 2000, epoch=3)


def test_whole_words_and_the_share_of_tokens_are_masked(many):
    """The budgets of 64 tokens are 19 and 32; enough single tokens exist to fill them."""
    [(_, word_T)] = masker().tokenize(["lanesing of rows, a block. " * 9])
    assert len(word_T) == 64
    for text in many:
        assert text.masked_T.sum() == round(0.3 * 64)
        assert (hidden(text).sum(axis=1) == 32).all()
        rows_RT = np.stack([text.masked_T, *hidden(text)])
        for word in range(word_T.max() + 1):
            word_RW = rows_RT[:, word_T == word]
            assert (word_RW == word_RW[:, :1]).all()
        assert not rows_RT[:, word_T < 0].any()
        assert (text.ordinary_T == (word_T >= 0)).all()


def test_replacements_of_masked_tokens_in_the_encoder(many):
    """0.8 mask tokens, 0.1 random ones, 0.1 themselves (and when a random one is the same), 5 standard deviations."""
    tokenizer = pieces()
    input_T, own = (np.concatenate([getattr(t, name)[t.masked_T] for t in many]) for name in ("shown_T", "token_T"))
    times, kinds = len(input_T), len(PIECES) - len(SPECIAL)

    def near(count, share):
        return abs(count - times * share) < 5 * np.sqrt(times * share * (1 - share))

    assert near((input_T == tokenizer.mask_token_id).sum(), 0.8)
    assert near((input_T == own).sum(), 0.1 + 0.1 / kinds)
    others = Counter(input_T[(input_T != own) & (input_T != tokenizer.mask_token_id)].tolist())
    assert others.keys() == set(range(len(SPECIAL), len(PIECES)))
    for word, count in others.items():
        assert near(count, 0.1 / kinds * (own != word).mean())
    for text in many:
        assert (text.shown_T[~text.masked_T] == text.token_T[~text.masked_T]).all()


def test_each_position_has_one_of_the_choices_at_random():
    [text] = masked(["lane row " * 400], length=512)
    assert text.visible_RS.shape == (CHOICES, 64)
    assert len(np.unique(hidden(text), axis=0)) == CHOICES
    picks = np.concatenate([t.pick_T for t in masked(["lane row " * 400] * 100, length=512)])
    counts = np.bincount(picks, minlength=CHOICES)
    assert len(counts) == CHOICES and np.abs(counts - 200).max() < 5.5 * np.sqrt(200)
    [short] = masked(["lane row a of"])
    assert short.visible_RS.shape == (6, 1) and short.pick_T.max() < 6


def test_shares_follow_the_flags(many):
    [text] = masked(["lane row " * 400], length=100, encoder_mlm_probability=0.15, decoder_mlm_probability=0.7)
    assert text.masked_T.sum() == 15
    assert (hidden(text).sum(axis=1) == 70).all()


def test_masks_depend_on_seed_epoch_and_row_only():
    rows = rows_of(TEXTS)
    whole = dict(zip([row.offset for row in rows], masked(TEXTS), strict=True))
    part = [rows[i] for i in (5, 0, 3)]
    for row, text in zip(part, unpack_masked(masker()(0, 7, part)).texts, strict=True):
        assert same(text, whole[row.offset])
    [plain], [later], [other], [again] = (
        masked(TEXTS[7:], epoch, copies, seed=seed)
        for epoch, copies, seed in ((0, None, 0), (1, None, 0), (0, None, 1), (0, [1], 0))
    )
    assert same(plain, masked(TEXTS[7:])[0])
    for changed in (later, other, again):
        assert not np.array_equal(plain.masked_T, changed.masked_T)
        assert not np.array_equal(plain.visible_RS, changed.visible_RS)
        assert not np.array_equal(plain.pick_T, changed.pick_T)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_batch_survives_its_table():
    make = masker()
    batch = unpack_masked(make(2, 9, rows_of(TEXTS)))
    assert (batch.step, batch.rows) == (9, [(0, 10 * i) for i in range(len(TEXTS))])
    for row, (token_T, word_T), text in zip(rows_of(TEXTS), make.tokenize(TEXTS), batch.texts, strict=True):
        assert same(text, make.mask(token_T, word_T, generator("mask", 0, 2, row.file, row.offset, 0)))
        assert [a.dtype for a in vars(text).values()] == [np.int32, bool, np.int32, bool, np.uint8, np.uint8]
    assert [ids.tolist() for ids in batch.token_ids] == [text.token_T.tolist() for text in batch.texts]


def test_an_empty_batch_stays_empty():
    batch = unpack_masked(masker()(0, 3, []))
    assert (batch.step, batch.rows, batch.texts) == (3, [], [])


def test_a_table_is_small():
    """The decoder's masks of 64 texts would be 16 MB."""
    table = masker(length=512)(0, 0, rows_of(["lane row " * 400] * 64))
    assert table.nbytes < 1.4e6


# --- odd texts --------------------------------------------------------------------------------------------------------


def test_one_token():
    [text] = masked(["lane"])
    assert text.token_T.tolist() == [2, 5, 3]
    assert text.masked_T.tolist() == [False, True, False]
    assert hidden(text).tolist() == [[False, True, False]] * 3


def test_a_word_that_does_not_fit_is_not_masked():
    [text] = masked(["lanesing"])  # 3 of 5 tokens, and budgets of 2
    assert not text.masked_T.any() and not hidden(text).any()


def test_a_text_without_tokens():
    [text] = masked(["\u200b\x00"])
    assert text.token_T.tolist() == [2, 3] and not text.ordinary_T.any() and not text.masked_T.any()
    bare = pieces()
    bare.backend_tokenizer.post_processor = None
    [text] = masked(["\u200b\x00"], tokenizer=bare)
    assert text.token_T.tolist() == [4] and not text.ordinary_T.any()


def test_only_punctuation():
    [text] = masked(["... ,,, ?! " * 3])
    assert len(text.token_T) == 2 + 24
    assert text.masked_T.sum() == 8 and (hidden(text).sum(axis=1) == 13).all()


def test_a_text_of_100_000_tokens_is_not_tokenized_completely(monkeypatch):
    read = []
    head = tokens_module._head
    monkeypatch.setattr(tokens_module, "_head", lambda *a: read.append(len(head(*a))) or head(*a))
    [text] = masked(["lane row " * 50_000], length=512)
    assert len(text.token_T) == 512 and text.masked_T.sum() == 154
    assert read[0] <= 8 * 512


def test_a_tokenizer_without_a_mask_token_is_named():
    with pytest.raises(UserError, match="tokenizer of here/there has no mask token"):
        masker(pieces(mask=None, name_or_path="here/there"))
