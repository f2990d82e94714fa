"""Masks for pre-training: raybge's collator against loops like FlagEmbedding's, on the same texts and one core.

    python benchmarks/masking.py --out runs/bench/masking.json
    python benchmarks/masking.py --texts 16 --tokens 128

The encoder's mask and the decoder's, (tokens, tokens) for each text, of 64 texts of 512 tokens take raybge at most 150
ms: drawing them, and unpacking them to the tensor that attention reads. For comparison, the steps of FlagEmbedding's
collator: a list of words shuffled for each of 256 choices, a loop over tokens for each, a deep copy of one for each
position. The time excludes tokenizing. raybge's is the median of `--rounds`; the loop runs once.
"""

from __future__ import annotations

import copy
import random
import statistics
import time

import common
import numpy as np

CLAIM_MS = 150
CHOICES = 256


def loop_masks(pieces: list[str], share: float, count: int) -> list[list[int]]:
    """Return `count` random choices of whole words, each a list of 0 and 1 per token."""
    masks = []
    for _ in range(count):
        words: list[list[int]] = []
        for i, piece in enumerate(pieces):
            if piece in ("[CLS]", "[SEP]"):
                continue
            if words and piece.startswith("##"):
                words[-1].append(i)
            else:
                words.append([i])
        random.shuffle(words)
        budget = max(1, round(len(pieces) * share))
        chosen: set[int] = set()
        for word in words:
            if len(chosen) >= budget:
                break
            if len(chosen) + len(word) <= budget:
                chosen.update(word)
        masks.append([1 if i in chosen else 0 for i in range(len(pieces))])
    return masks


def loop(texts: list[list[str]]) -> None:
    """Compute the encoder's and the decoder's masks of each text as tensors."""
    import torch

    for pieces in texts:
        torch.tensor(loop_masks(pieces, 0.3, 1)[0])
        choices = loop_masks(pieces, 0.5, min(len(pieces), CHOICES))
        rows = []
        for i in range(len(pieces)):
            row = copy.deepcopy(choices[random.randrange(len(choices))])
            row[i] = 1
            rows.append(row)
        1 - torch.tensor(rows)


def pieces_of(texts: int, tokens: int) -> list[list[str]]:
    """Return random texts in which a fifth of the tokens continue a word."""
    rng = random.Random(0)
    inner = [
        [f"##{rng.randrange(10)}" if i and rng.random() < 0.2 else f"w{rng.randrange(1000)}" for i in range(tokens - 2)]
        for _ in range(texts)
    ]
    return [["[CLS]", *pieces, "[SEP]"] for pieces in inner]


def masker(tokens: int):
    """Return raybge's masker with a tokenizer that has the random texts' words."""
    import tokenizers
    import transformers

    from raybge.data.masking import TextMasker

    words = ["[UNK]", "[MASK]", *(f"w{i}" for i in range(1000))]
    core = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, mask_token="[MASK]", unk_token="[UNK]")
    return TextMasker(tokenizer, tokens, seed=0)


def measure(texts: int, tokens: int, rounds: int) -> dict:
    """Measure the milliseconds of both on the same random texts."""
    import torch

    from raybge.data.masking import number_words
    from raybge.data.mixture import generator
    from raybge.losses.enhanced_decoder import visible_context

    torch.set_num_threads(1)
    pieces = pieces_of(texts, tokens)
    draw = masker(tokens)
    ids = np.arange(5, 5 + tokens, dtype=np.int32) % 1000
    words = []
    for text in pieces:
        starts = np.cumsum([not piece.startswith("##") for piece in text], dtype=float)
        starts[[0, -1]] = np.nan
        words.append(number_words(starts))
    draw_ms, unpack_ms = [], []
    for step in range(rounds):
        start = time.perf_counter()
        masks = [draw.mask(ids, word_T, generator("mask", 0, step, 0, i, 0)) for i, word_T in enumerate(words)]
        middle = time.perf_counter()
        assert visible_context(masks, tokens, torch.device("cpu")).shape == (texts, tokens, tokens)
        draw_ms.append(1e3 * (middle - start))
        unpack_ms.append(1e3 * (time.perf_counter() - middle))
    start = time.perf_counter()
    loop(pieces)
    slow = 1e3 * (time.perf_counter() - start)
    draws, unpacks = statistics.median(draw_ms), statistics.median(unpack_ms)
    fast = draws + unpacks
    print(f"{texts} texts of {tokens} tokens, one core")
    print(f"raybge: {fast:.0f} ms ({draws:.0f} drawing, {unpacks:.0f} unpacking)")
    print(f"a loop like FlagEmbedding's: {slow:.0f} ms, {slow / fast:.0f} times as long")
    return {"texts": texts, "tokens": tokens, "raybge_ms": round(fast, 1), "loop_ms": round(slow, 1)}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    result = measure(args.texts, args.tokens, args.rounds)
    result["holds"] = result["raybge_ms"] <= CLAIM_MS * args.texts * args.tokens**2 / (64 * 512**2)
    common.write_result(result, args.out)
    if not result["holds"]:
        raise SystemExit("the claim does not hold")


if __name__ == "__main__":
    main()
