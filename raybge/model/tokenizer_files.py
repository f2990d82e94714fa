"""Files of a tokenizer, checked before it is loaded: transformers makes an empty tokenizer of a folder without them.

Every word is unknown to an empty tokenizer, or becomes no token at all, and training goes on all the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raybge.model.weight_files import check_not_pointer
from raybge.util.errors import UserError

TOKENIZER = "tokenizer.json"
_WORDS, _PAIRS, _MERGES = "vocab.txt", "vocab.json", "merges.txt"
# sentencepiece (spiece.model, tokenizer.model, ...) and other formats with everything in one file
_SINGLE_FILES = ("*.model", "*.tiktoken", "tekken.json")
_EXPECTED = (
    f"expected {TOKENIZER}, or {_WORDS}, or {_PAIRS} with {_MERGES}, or a sentencepiece model such as tokenizer.model: "
    "copy them from the model that this one was trained from"
)
_WITHOUT_VOCABULARY = ("CanineTokenizer", "ByT5Tokenizer", "PerceiverTokenizer")
# Parts that the library writes for every tokenizer, as null if it has none.
_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
# A smaller share of the model's token ids in a vocabulary without structure is taken for a file that is cut off.
_LEAST_SHARE = 0.95


def check_tokenizer_files(folder: str | Path, ids: int | None = None) -> None:
    """Raise UserError if a folder has no vocabulary of any kind of tokenizer, or a damaged one.

    Args:
        folder: folder of the tokenizer.
        ids: `vocab_size` of the model's configuration, which a vocabulary in plain text must nearly fill; None if
            unknown.
    """
    folder = Path(folder)
    if (folder / TOKENIZER).is_file():
        _check_tokenizer_json(folder / TOKENIZER)
        return
    single = [path for pattern in _SINGLE_FILES for path in sorted(folder.glob(pattern))]
    for path in single:
        check_not_pointer(path)
    pairs = [folder / _PAIRS, folder / _MERGES]
    if (folder / _WORDS).is_file():
        _check_words(folder / _WORDS, ids)
    elif all(path.is_file() for path in pairs):
        _check_merges(*pairs)
    elif not single and not _has_own_code(folder):
        missing = [path.name for path in pairs if not path.is_file()]
        half = f", {missing[0]} is missing" if len(missing) == 1 else ""
        raise UserError(f"no tokenizer here{half}: {_EXPECTED}")


def _has_own_code(folder: Path) -> bool:
    """Return True for a tokenizer of the folder's own code, and for one of bytes or characters without a vocabulary."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return False
    config = _read(path)
    return isinstance(config, dict) and (
        "AutoTokenizer" in (config.get("auto_map") or ()) or config.get("tokenizer_class") in _WITHOUT_VOCABULARY
    )


def _read(path: Path) -> Any:
    check_not_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}): copy the file again") from error


def _check_tokenizer_json(path: Path) -> None:
    content = _read(path)
    missing = [name for name in _PARTS if not isinstance(content, dict) or name not in content]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing: expected a file that the library `tokenizers` has written")
    model = content["model"]
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list) or not model["vocab"]:
        raise UserError(f"{path}: model.vocab: expected the tokens of a vocabulary, with their ids or scores")


def _check_words(path: Path, ids: int | None) -> None:
    check_not_pointer(path)
    words = path.read_bytes().count(b"\n")
    if ids and words + 1 < ids * _LEAST_SHARE:
        raise UserError(
            f"{path} has {words:,} tokens, the model {ids:,} (vocab_size in config.json): the file is cut off or of "
            "another model: copy it again"
        )


def _check_merges(vocabulary: Path, merges: Path) -> None:
    """Check that nearly every token of more than one character is made by a merge, unless it is a special one."""
    tokens = _read(vocabulary)
    if not isinstance(tokens, dict) or not tokens:
        raise UserError(f"{vocabulary}: expected an object of tokens with their ids")
    check_not_pointer(merges)
    lines = merges.read_text(encoding="utf-8", errors="replace").split("\n")
    merged = {"".join(line.split(" ")[:2]) for line in lines}  # XLM's lines end with a count
    long = [token for token in tokens if len(token) > 1 and not (token[0] in "<[|" and token[-1] in ">]|")]
    if sum(token in merged for token in long) < len(long) * _LEAST_SHARE:
        raise UserError(f"{merges} lacks merges of the tokens of {vocabulary.name}: the file is cut off: copy it again")
