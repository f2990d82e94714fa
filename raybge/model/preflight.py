"""Preflight check of a model in the driver: its configuration and tokenizer are built as in a worker, without weights.

Errors of a model's folder appear before any worker starts, and before data is encoded or trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raybge.data.text_sample import sample_texts
from raybge.model.folder import FolderSettings, read_settings
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.data.jsonl import Parse
    from raybge.data.survey import Survey

SAMPLE_CHARACTERS = 1 << 17  # of the data, tokenized for the share of unknown words: about 20,000 words
SAMPLE_BLOCKS = 8  # that the sample is read from: it has to be quick for data in an object store too
LONGEST_TEXT = 4096  # characters of a text of the sample
FEWEST_CHARACTERS = 100  # of a sample that says anything about a language
MOST_UNKNOWN = 0.5  # share of unknown words above which the tokenizer is taken for one of another language or model


def word_sample(survey: Survey, parse: Parse, inputs: int = 1) -> list[str]:
    """Return a sample of the texts of one of several inputs, whose words the tokenizer must know.

    Args:
        survey: the input.
        parse: parser of its rows.
        inputs: number of inputs that share the sample.

    Returns:
        The texts.
    """
    return sample_texts(survey, parse, LONGEST_TEXT, SAMPLE_CHARACTERS // inputs, SAMPLE_BLOCKS)


def check_model(
    name: str,
    texts: Callable[[], Sequence[str]] | None = None,
    tokenizer_name: str | None = None,
    config_name: str | None = None,
    use_fast_tokenizer: bool = True,
    settings: FolderSettings | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Build a model's configuration, network without weights and tokenizer, and check that they fit each other.

    Args:
        name: a folder, or a name on the hub.
        texts: returns a sample of the data, of whose words the tokenizer must know at least half; None: not checked,
            nor is a sample of a few words.
        tokenizer_name: another tokenizer than the model's own.
        config_name: another configuration than the model's own.
        use_fast_tokenizer: use the tokenizer written in Rust.
        settings: settings of the folder; None: read them.
        cache_dir: folder for models from the hub.
        token: access token for the hub.
        trust_remote_code: run code of the model's folder.

    Raises:
        UserError: a file is missing or damaged, a setting has a wrong value, or most words are unknown.
    """
    from raybge.model.loaded_checks import check_token_ids, unknown_share
    from raybge.model.loading import ModelLocation, load_tokenizer, make_empty

    settings = settings or read_settings(name, cache_dir, token)
    source = ModelLocation(name, settings, config_name, cache_dir, token, trust_remote_code)
    network = make_empty(source)  # before the tokenizer, whose class depends on the same file
    tokenizer = load_tokenizer(source, tokenizer_name, use_fast_tokenizer)
    check_token_ids(tokenizer, tokenizer_name or name, network, name)
    sample = texts() if texts else []
    if sum(map(len, sample)) < FEWEST_CHARACTERS:
        return
    share = unknown_share(tokenizer, sample)
    if share > MOST_UNKNOWN:
        raise UserError(
            f"{tokenizer_name or name}: the tokenizer does not know {share:.0%} of the words of a sample of the data: "
            "expected a model whose tokenizer has words for them; --allow_unknown_tokens True goes on all the same"
        )
