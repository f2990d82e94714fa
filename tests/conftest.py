"""What every test shares: an environment that reaches no hub, no running Ray cluster and no telemetry."""

import os

import pytest
from hypothesis import settings

# Set here, at import: Ray and Hugging Face read these when first imported; Ray's workers inherit them.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps Ray's ports on loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",  # tokenizers warn when a process that used threads forks
    }
)
# A test that wants a running cluster starts one and says so itself.
os.environ.pop("RAY_ADDRESS", None)

# Examples follow from the test's source alone and take the time they need: one run is like the next.
settings.register_profile("raybge", derandomize=True, deadline=None)
settings.load_profile("raybge")


WORDS = [first + second for first in "abcdefghij" for second in "klmnopqrst"]


@pytest.fixture(scope="session")
def words() -> list[str]:
    """The words of the tiny model."""
    return WORDS


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sentence-transformers folder with a random BERT of two layers: mean pooling, normalised, 16 tokens.

    Its words are those of the fixture `words`; anything else is one unknown token, so texts that differ in
    their words differ in their vectors.
    """
    import tokenizers
    import torch
    import transformers

    from raybge.model.folder import FolderSettings, write_settings

    folder = tmp_path_factory.mktemp("tiny_model")
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    write_settings(folder, FolderSettings(pooling="mean", normalize=True, max_length=16), 32, {})
    return str(folder)
