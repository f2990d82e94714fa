"""How well a model does on a few examples, as one number: what LM-Cocktail finds a mixture's weights by.

https://arxiv.org/abs/2311.13534. The recipe's own code repeats earlier examples in every further batch and takes the
first token's vector of any model; here each example counts once, and vectors are made as the model's folder says.

Letters in tensor names: B queries or examples of a batch, N passages of the batch, D width of a vector, T tokens, V
words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from raybge.data.groups import Group
from raybge.data.mixture import generator
from raybge.merging.sources import Ingredient, tokenizer_of
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.model.encoder import Encoder

TEMPERATURE = 0.05  # the recipe's, of the contrastive loss
_IGNORED = -100  # torch's: a place without a target


@dataclass(frozen=True)
class Examples:
    """What models are scored on, and how; the same for all, so that their losses compare.

    Args:
        rows: groups for embedding models, (input, output) for language models.
        batch_size: examples at a time; a group's query also sees the passages of its batch's other groups.
        max_input_length: in tokens, special ones included; at most what an embedding model holds.
        neg_number: negatives of a group at most; where it has more they are drawn by `seed`.
    """

    model_type: str
    rows: Sequence[Any]
    batch_size: int = 2
    max_input_length: int = 2048
    neg_number: int = 7
    seed: int = 42
    cache_dir: str | None = None
    trust_remote_code: bool = False

    def loss(self, name: str, threads: int, device: str) -> float:
        """That of one model, which is loaded here: a folder, or a name on the hub."""
        torch.set_num_threads(threads)
        if self.model_type == "encoder":
            return self._contrastive(name, device)
        model = Ingredient.find(name, self.model_type, "--model_names_or_paths", self.cache_dir)
        options: dict[str, Any] = {"dtype": torch.float32} if device == "cpu" else {}
        loaded = model.load(self.model_type, self.trust_remote_code, **options)
        tokenizer = tokenizer_of(model, self.trust_remote_code)
        with torch.no_grad():
            return generation_loss(
                loaded.to(device).eval(), tokenizer, self.rows, self.batch_size, self.max_input_length
            )

    def _contrastive(self, name: str, device: str) -> float:
        from raybge.model.encoder import Encoder

        encoder = Encoder(
            name,
            normalize_embeddings=True,
            devices=device,
            query_max_length=self.max_input_length,
            passage_max_length=self.max_input_length,
            cache_dir=self.cache_dir,
            trust_remote_code=self.trust_remote_code,
        )
        drawn = [draw_negatives(row, self.neg_number, self.seed, i) for i, row in enumerate(self.rows)]
        with torch.no_grad():
            return contrastive_loss(encoder, drawn, self.batch_size)


def weights_of(losses: Sequence[float], temperature: float) -> list[float]:
    """The recipe's weights of models by their losses: softmax(-loss / temperature)."""
    raised = np.exp((min(losses) - np.array(losses, np.float64)) / temperature)
    return (raised / raised.sum()).tolist()


def draw_negatives(group: Group, most: int, seed: int, number: int) -> Group:
    """The group of that number with at most so many negatives, and its first positive alone, as in the recipe."""
    chosen = sorted(generator("examples", seed, number).permutation(len(group.neg))[:most].tolist())
    return Group(group.query, group.pos[:1], tuple(group.neg[i] for i in chosen), group.prompt)


def contrastive_loss(encoder: Encoder, groups: Sequence[Group], batch_size: int) -> float:
    """InfoNCE at the recipe's temperature, the mean over the groups' queries; each sees all passages of its batch."""
    from raybge.losses.functional import info_nce

    total = 0.0
    for start in range(0, len(groups), batch_size):
        batch = groups[start : start + batch_size]
        passages = [text for group in batch for text in group.pos + group.neg]
        ids = encoder.tokenize([encoder.query_text(g.query, g.prompt) for g in batch], encoder.query_max_length)
        ids += encoder.tokenize([encoder.passage_text(text) for text in passages], encoder.passage_max_length)
        e_ND = encoder.model.embed(ids, encoder.passage_max_length * batch_size)
        targets_B = torch.tensor(np.cumsum([0, *(len(g.pos + g.neg) for g in batch[:-1])]), device=e_ND.device)
        total += float(info_nce(e_ND[: len(batch)], e_ND[len(batch) :], targets_B, None, TEMPERATURE).sum())
    return total / len(groups)


def generation_loss(
    model: Any, tokenizer: Any, examples: Sequence[tuple[str, str]], batch_size: int, max_length: int
) -> float:
    """Cross-entropy of the outputs under a language model: a mean over each one's tokens, then over the examples.

    UserError for an example whose input leaves no room for its output.
    """
    whole = bool(model.config.is_encoder_decoder)
    made = [(_pair if whole else _continued)(tokenizer, *example, max_length) for example in examples]
    for number, (_, labels) in enumerate(made, start=1):
        if all(label == _IGNORED for label in labels):
            raise UserError(f"example {number}: its input alone is longer than --max_input_length {max_length}")
    total = 0.0
    for start in range(0, len(made), batch_size):
        batch = made[start : start + batch_size]
        ids_BT = _padded([ids for ids, _ in batch], tokenizer.pad_token_id)
        mask_BT = _padded([[1] * len(ids) for ids, _ in batch], 0)
        labels_BT = _padded([labels for _, labels in batch], _IGNORED).to(model.device)
        inputs = {"input_ids": ids_BT.to(model.device), "attention_mask": mask_BT.to(model.device)}
        if whole:
            logits_BTV = model(**inputs, labels=labels_BT).logits
        else:  # each token is to be told from those before it
            logits_BTV, labels_BT = model(**inputs).logits[:, :-1], labels_BT[:, 1:]
        loss_BT = nn.functional.cross_entropy(
            logits_BTV.float().transpose(1, 2), labels_BT, reduction="none", ignore_index=_IGNORED
        )
        total += float((loss_BT.sum(dim=1) / (labels_BT != _IGNORED).sum(dim=1)).sum())
    return total / len(made)


def _continued(tokenizer: Any, text: str, output: str, most: int) -> tuple[list[int], list[int]]:
    """A decoder's tokens of input and output, and its targets: the output and the end."""
    ids, before = tokenizer.encode(f"{text} {output}"), tokenizer.encode(text)
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    same = next((i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(before))
    return ids[:most], ([_IGNORED] * same + ids[same:])[:most]


def _pair(tokenizer: Any, text: str, output: str, most: int) -> tuple[list[int], list[int]]:
    """An encoder's tokens of the input, and the decoder's targets."""
    return tokenizer.encode(text)[:most], tokenizer.encode(output)[:most]


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """rows_BT, filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
