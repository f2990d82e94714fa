"""Tiny random models of each model family, with their tokenizers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SENTENCE = "what is a lane row block of the text that we read and sort by length in chunks on one node"
WORDS = [*SENTENCE.split(), "##s"]
ENCODERS = ("bert", "roberta", "distilbert", "mpnet", "modernbert", "nomic_bert")
DECODERS = ("qwen3", "llama", "gpt2")
KINDS = ENCODERS + DECODERS


def make_tiny(
    folder: Path,
    kind: str = "bert",
    pooler: bool = True,
    dropout: float = 0.1,
    head: bool = False,
    words: Sequence[str] = WORDS,
    mask: bool = False,
    **more: Any,
) -> str:
    """Write a random model of two layers for texts of 32 tokens and return its folder.

    The folder has weights, configuration and tokenizer, but none of sentence-transformers' files. Each family has its
    peculiarities: roberta and mpnet number positions from the padding id + 1 on, modernbert's second layer attends to 4
    tokens on each side, qwen3's tokenizer appends an end token and pads on the left, llama's prepends a start token and
    has no padding token, gpt2's adds nothing.

    Args:
        folder: folder to write.
        kind: model family, one of KINDS.
        pooler: with the family's pooling layer.
        dropout: dropout probability.
        head: with a language modeling head.
        words: vocabulary of the tokenizer, at most 60 words; more with `vocab_size`.
        mask: the tokenizer has a mask token.
        **more: fields of the configuration.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**_settings(kind, dropout), **more})
    auto: Any = transformers.AutoModel
    if head:
        auto = transformers.AutoModelForCausalLM if kind in DECODERS else transformers.AutoModelForMaskedLM
    options = {} if pooler or head else {"add_pooling_layer": False}
    model = auto.from_config(config, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "bias" in name:
                parameter.normal_(std=0.1)  # a missing bias would not be noticed if it were zero
    model.save_pretrained(folder)
    tokenizer(kind, words, mask).save_pretrained(folder)
    return str(folder)


def _settings(kind: str, dropout: float) -> dict[str, Any]:
    """Return the configuration: two layers, width 16, two heads, weights large enough to distinguish texts."""
    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "initializer_range": 0.5, "max_position_embeddings": 32, "pad_token_id": 0}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    rope = {"num_key_value_heads": 1, "head_dim": 8, "attention_dropout": dropout, "bos_token_id": 2, "eos_token_id": 3}
    behind = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 34}
    special = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    own: dict[str, dict[str, Any]] = {
        "bert": dropouts,
        "nomic_bert": dropouts,
        "roberta": {**dropouts, **behind, "type_vocab_size": 1},
        "mpnet": {**dropouts, **behind},
        "modernbert": {**special, "local_attention": 8, "attention_dropout": dropout, "embedding_dropout": dropout},
        "qwen3": rope,
        "llama": {**rope, "pad_token_id": None},
    }
    if kind == "distilbert":
        names = {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "initializer_range": 0.5}
        return {**names, "max_position_embeddings": 32, "dropout": dropout, "attention_dropout": dropout}
    if kind == "gpt2":
        names = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
        return {
            **names,
            **{f"{part}_pdrop": dropout for part in ("resid", "embd", "attn")},
            "bos_token_id": 2,
            "eos_token_id": 3,
        }
    return {**size, **own[kind]}


def tokenizer(kind: str, words: Sequence[str] = WORDS, mask: bool = False) -> Any:
    """Build a tokenizer that splits at white space; other words than `words` become one unknown token."""
    import tokenizers
    import transformers

    special = (
        ["<s>", "<pad>", "</s>", "<unk>"] if kind in ("roberta", "mpnet") else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    )
    vocab = {word: i for i, word in enumerate([*special, *words])}
    pad, unknown, first, last = (special[1], special[3], special[0], special[2]) if special[0] == "<s>" else special
    core = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token=unknown))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    around = {"qwen3": f"$A {last}", "llama": f"{first} $A", "gpt2": "$A"}.get(kind, f"{first} $A {last}")
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=around, special_tokens=[(token, vocab[token]) for token in (first, last)]
    )
    names = {"unk_token": unknown, "bos_token" if kind in DECODERS else "cls_token": first}
    names |= {"eos_token" if kind in DECODERS else "sep_token": last}
    if kind not in ("llama", "gpt2"):
        names["pad_token"] = pad
    if mask:
        names["mask_token"] = "[MASK]"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, padding_side="left" if kind == "qwen3" else "right", **names
    )


# Special tokens that the tokenizer adds to a pair of texts; [CLS] [SEP] for the families that are not listed.
PAIR_TEMPLATES = {
    "roberta": "<s> $A </s> </s> $B </s>",
    "llama": "[CLS] $A [CLS] $B",
    "qwen3": "$A $B [SEP]",
    "gpt2": "$A $B",
}


def make_classifier(folder: Path, kind: str = "bert", labels: int = 1, **more) -> str:
    """Write a tiny random sequence classifier whose tokenizer encodes pairs as its family does; return its folder."""
    import tokenizers
    import torch
    import transformers

    make_tiny(folder, kind, dropout=0.0, **more)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_labels = labels
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    pair_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    core = pair_tokenizer.backend_tokenizer
    special = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]", "<s>", "</s>")]
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A",
        pair=PAIR_TEMPLATES.get(kind, "[CLS] $A [SEP] $B:1 [SEP]:1"),
        special_tokens=[(token, number) for token, number in special if number is not None],
    )
    if kind != "roberta":
        pair_tokenizer.add_special_tokens({"additional_special_tokens": ["[PAD]", "[SEP]"]})
    pair_tokenizer.save_pretrained(folder)
    if kind in ("bert", "distilbert"):  # distilbert ignores the token types
        configure_tokenizer(folder, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    return str(folder)


def make_t5(folder: Path) -> str:
    """Write a tiny random encoder-decoder model; return its folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    size = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**size, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer("bert").save_pretrained(folder)
    return str(folder)


def write_placeholders(folder: Path) -> None:
    """Write the smallest weights and tokenizer that a folder's check accepts; no model can be loaded from them."""
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    parts = dict.fromkeys(["added_tokens", "normalizer", "pre_tokenizer", "post_processor"])
    (folder / "tokenizer.json").write_text(json.dumps({**parts, "model": {"vocab": {"a": 0}}}))


def perturb_weights(folder: str | Path, seed: int, dtype: Any = None) -> str:
    """Add noise to the weights of a model, in place, and convert them to `dtype` if it is set; return its folder."""
    import torch
    from safetensors.torch import load_file, save_file

    path = Path(folder) / "model.safetensors"
    torch.manual_seed(seed)
    weights = {name: (t + 0.3 * torch.randn_like(t)).to(dtype or t.dtype) for name, t in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    return str(folder)


def configure_tokenizer(folder: str | Path, **more) -> None:
    """Set fields of a tokenizer's configuration file."""
    path = Path(folder) / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
