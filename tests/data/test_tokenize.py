"""Long texts are tokenized in part, with exactly the tokens of transformers' own call."""

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from raybge.data import tokenize as tokens_module
from raybge.data.prompts import Instructions
from raybge.data.tokenize import TextTokenizer

TEXT = "what is a lane, or a row? we read block after block... of the text that we sort by length in chunks on 1 node\n"


def trained(kind: str) -> transformers.PreTrainedTokenizerFast:
    """Return a small tokenizer of each family, trained on one sentence."""
    special = ["[UNK]", "[CLS]", "[SEP]", "<s>"]
    if kind == "bert":
        core = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        core.normalizer = tokenizers.normalizers.BertNormalizer()
        core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=80, special_tokens=special)
    elif kind == "roberta":
        core = tokenizers.Tokenizer(tokenizers.models.BPE())
        core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=special)
    else:
        core = tokenizers.Tokenizer(tokenizers.models.Unigram())
        core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="[UNK]")
    core.train_from_iterator([TEXT * 20], trainer)
    if kind == "unsplit":  # as some decoders: no word ends a token for certain
        core.pre_tokenizer = None
    first, last = core.token_to_id("[CLS]"), core.token_to_id("[SEP]")
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", first), ("[SEP]", last)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


KINDS = {kind: trained(kind) for kind in ("bert", "roberta", "unigram", "unsplit")}


def as_transformers_does(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    return [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]


def as_we_do(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    lengths, ids = TextTokenizer(tokenizer, Instructions(), 8, max_length)([], texts)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(
    texts=st.lists(
        st.text(alphabet=TEXT + "żółw 日本 \t\u3000[]", max_size=1500) | st.integers(0, 30).map(TEXT.__mul__)
    ),
    max_length=st.integers(3, 20),
)
def test_tokens_are_those_of_transformers(kind, texts, max_length):
    assert as_we_do(KINDS[kind], texts, max_length) == as_transformers_does(KINDS[kind], texts, max_length)


@pytest.mark.parametrize("text", [TEXT * 100, "a" * 300 + " " + TEXT * 100, "日" * 5000, " " * 3000 + TEXT, "\n" * 900])
@pytest.mark.parametrize("kind", KINDS)
def test_long_words_long_gaps_and_no_gaps(kind, text):
    assert as_we_do(KINDS[kind], [text, "a row"], 12) == as_transformers_does(KINDS[kind], [text, "a row"], 12)


def test_only_the_head_of_a_long_text_is_tokenized(monkeypatch):
    """The characters that reach the tokenizer are counted."""
    given_characters = []
    head = tokens_module._head
    monkeypatch.setattr(tokens_module, "_head", lambda *a: given_characters.append(len(head(*a))) or head(*a))
    assert len(as_we_do(KINDS["bert"], [TEXT * 100], 32)[0]) == 32
    assert 128 < given_characters[0] <= 8 * 32


def test_a_tokenizer_that_truncates_the_beginning_receives_all():
    tokenizer = trained("bert")
    tokenizer.truncation_side = "left"
    texts = [TEXT * 50 + "a row"]
    assert as_we_do(tokenizer, texts, 9) == as_transformers_does(tokenizer, texts, 9)
    assert as_we_do(tokenizer, texts, 9)[0][-3:] == tokenizer("row")["input_ids"][-3:]


def test_instructions_and_a_rows_own_prompt():
    tokenizer = KINDS["bert"]
    texts = TextTokenizer(tokenizer, Instructions("we read ", "{}{}", "block "), 16, 16)
    lengths, ids = texts([("a lane", None), ("a lane", "sort ")], ["a row"])
    wanted = [tokenizer(text)["input_ids"] for text in ("we read a lane", "sort a lane", "block a row")]
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == wanted
    assert ids.dtype == lengths.dtype == np.int32
