"""The known name that a person meant, where the unknown one differs from it by a typing error alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from raybge.cli.flag import Flag

SHORTEST = 3  # letters of a word that may have an error
LETTERS_PER_ERROR = 7


def suggest_flag(name: str, flags: Mapping[str, Flag], words: Collection[str]) -> str | None:
    """Return the flag that a person meant.

    Names that merely look alike often mean something else: --use_cpu and --use_gpu, --fp32 and --fp16. So a word that
    any flag contains is not taken for a typing error of another one, except for its plural, nor is one with a number.

    Args:
        name: the unknown flag, without the dashes.
        flags: flags of the command by name; those that cannot be used are not suggested.
        words: words of which the names of all flags consist, such as "cache" and "path".

    Returns:
        The spelling, without the dashes; None if none or several are equally close.
    """
    errors = {
        spelling: count
        for f in flags.values()
        if not f.refused and not f.no_effect
        for spelling in f.spellings
        if (count := _errors(name.lower().replace("-", "_"), spelling, words)) is not None
    }
    closest = [spelling for spelling, count in errors.items() if count == min(errors.values())]
    return closest[0] if len(closest) == 1 else None


def _errors(name: str, known: str, words: Collection[str]) -> int | None:
    """Return the number of typing errors that turn `known` into `name`; None if the names mean different things."""
    if name.replace("_", "") == known.replace("_", ""):
        return 0
    pairs = list(zip(name.split("_"), known.split("_"), strict=False))
    if name.count("_") != known.count("_"):
        return None
    total = 0
    for word, other in pairs:
        if word == other:
            continue
        errors = _edits(word, other)
        has_number = any(map(str.isdigit, word + other))
        if has_number or errors > 1 + len(other) // LETTERS_PER_ERROR or min(len(word), len(other)) < SHORTEST:
            return None
        if word in words and word.rstrip("s") != other.rstrip("s"):
            return None
        total += errors
    return total


def _edits(word: str, other: str) -> int:
    """Return the number of letters to insert, delete, replace, or swap with their neighbour (optimal alignment)."""
    above: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(word, start=1):
        before, above, row = above, row, [i]
        for j, target in enumerate(other, start=1):
            edits = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != target))
            if i > 1 and j > 1 and letter == other[j - 2] and word[i - 2] == target:
                edits = min(edits, before[j - 2] + 1)
            row.append(edits)
    return row[-1]
