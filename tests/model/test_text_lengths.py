"""The tokenizer without a model gives the tokens that the Encoder gives its texts."""

import pytest

from raybge.model.encoder import Encoder
from raybge.model.spec import EncoderSpec
from raybge.model.text_lengths import load_text_tokenizer

WORDS = "what is a lane row block of the text that we read".split()


@pytest.mark.parametrize("kind", ["bert", "roberta", "qwen3"])
@pytest.mark.parametrize("lengths", [{}, {"query_max_length": 5, "passage_max_length": 7}, {"query_max_length": 10**6}])
def test_tokens_equal_those_of_the_encoder(tiny, kind, lengths):
    instructions = {
        "query_instruction_for_retrieval": "read",
        "query_instruction_format": "{} {}",
        "passage_instruction_for_retrieval": "text ",
    }
    model = EncoderSpec(tiny(kind), **lengths, **instructions)
    encoder = Encoder(**{**model.keywords(), "devices": "cpu"})
    queries = [("lane row", None), (" ".join(WORDS), "what"), (" ".join(WORDS * 20), "")]
    passages = [" ".join(WORDS * n) for n in (1, 0, 30)]
    lengths_N, token_T = load_text_tokenizer(model)(queries, passages)
    expected = encoder.tokenize([encoder.query_text(*query) for query in queries], encoder.query_max_length)
    expected += encoder.tokenize([encoder.passage_text(text) for text in passages], encoder.passage_max_length)
    assert lengths_N.tolist() == [len(ids) for ids in expected]
    assert token_T.tolist() == [token for ids in expected for token in ids]
