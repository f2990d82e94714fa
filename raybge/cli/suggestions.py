"""The known name that a person meant, where the unknown one differs from it by a typing error alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from raybge.cli.flag import Flag

SHORTEST = 3  # letters of a word that may have an error
LETTERS_PER_ERROR = 7
# Names in other programs and in everyday use; the first flag that the command has is meant.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate",),
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "num_steps": ("max_steps",),
    "batch_size": ("per_device_train_batch_size",),
    "train_batch_size": ("per_device_train_batch_size",),
    "bs": ("per_device_train_batch_size", "batch_size"),
    "mini_batch_size": ("sub_batch_size",),
    "grad_accum": ("gradient_accumulation_steps",),
    "warmup": ("warmup_ratio",),
    "wd": ("weight_decay",),
    "scheduler": ("lr_scheduler_type",),
    "optimizer": ("optim",),
    "max_length": ("passage_max_len",),
    "max_seq_length": ("passage_max_len", "max_length"),
    "model": ("model_name_or_path", "model_names_or_paths"),
    "model_name": ("model_name_or_path", "model_names_or_paths"),
    "data": ("train_data", "input_file", "corpus_data"),
    "train_file": ("train_data",),
    "input": ("input_file",),
    "output": ("output_dir", "output_file", "output_path"),
    "out": ("output_dir", "output_file", "output_path"),
    "corpus": ("corpus_data",),
    "queries": ("query_data",),
    "eval_file": ("eval_data",),
    "negatives": ("negative_number",),
    "num_negatives": ("negative_number",),
    "top_k": ("k",),
    "workers": ("num_workers",),
    "lora": ("use_lora",),
}


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


def flag_of_other_name(name: str, flags: Mapping[str, Flag]) -> str | None:
    """Return the flag of this command that other programs call `name`; None if there is none."""
    targets = OTHER_NAMES.get(name.lower().replace("-", "_"), ())
    return next((t for t in targets if t in flags and not flags[t].refused and not flags[t].no_effect), None)


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
