"""A tiny random model with its tokenizer, made in a second."""

from pathlib import Path
from typing import Any

SENTENCE = "what is a lane row block of the text that we read and sort by length in chunks on one node"
SPECIAL = {"bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], "roberta": ["<s>", "<pad>", "</s>", "<unk>"]}


def make_tiny(folder: Path, kind: str = "bert", pooler: bool = True, dropout: float = 0.1) -> str:
    """Write a random model of two layers for texts of 32 tokens, kind "bert" or "roberta", and return its folder.

    It has weights, configuration and tokenizer, and none of sentence-transformers' files.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "initializer_range": 0.5}
    size |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if kind == "bert":
        config = transformers.BertConfig(**size, max_position_embeddings=32, pad_token_id=0)
        model = transformers.BertModel(config, pooler)
    else:
        special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        config = transformers.RobertaConfig(**size, **special, max_position_embeddings=34, type_vocab_size=1)
        model = transformers.RobertaModel(config, pooler)
    model.save_pretrained(folder)
    _tokenizer(kind).save_pretrained(folder)
    return str(folder)


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
