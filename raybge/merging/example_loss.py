"""Loss of a model on a few examples, from which LM-Cocktail derives merge weights, https://arxiv.org/abs/2311.13534.

LM-Cocktail's own code repeats earlier examples in every further batch and pools the first token of any model. Here each
example counts once, and embeddings are pooled as the model's folder states.

Shape suffixes: B queries or examples of a batch, N passages of the batch, D embedding dimension, T tokens,
V vocabulary.
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
from raybge.merging.sources import SourceModel, load_source_tokenizer
from raybge.model.spec import EncoderSpec
from raybge.util.errors import UserError

if TYPE_CHECKING:
    from raybge.model.encoder import Encoder

TEMPERATURE = 0.05  # of the contrastive loss, as in LM-Cocktail
_IGNORED = -100  # torch's label of a position without a target


@dataclass(frozen=True)
class ExampleSet:
    """Examples with the settings of their loss, equal for all models so that losses are comparable.

    Args:
        model_type: "encoder", "decoder" or "encoder-decoder".
        rows: groups for embedding models, (input, output) for language models.
        batch_size: examples per batch; a query is also contrasted with the passages of the batch's other groups.
        max_input_length: longest text in tokens, special tokens included, up to an embedding model's own maximum.
        neg_number: most negatives of a group; a larger number is sampled with `seed`.
        seed: of that sample.
        cache_dir: cache of the hub's models.
        trust_remote_code: run code from the models' folders.
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
        """Load a model and return its mean loss.

        Args:
            name: folder or hub name.
            threads: threads of torch.
            device: "cpu" or a CUDA device.

        Returns:
            The mean over the examples.
        """
        torch.set_num_threads(threads)
        if self.model_type == "encoder":
            return self._contrastive_loss(name, device)
        model = SourceModel.open(name, self.model_type, "--model_names_or_paths", self.cache_dir)
        options: dict[str, Any] = {"dtype": torch.float32} if device == "cpu" else {}
        loaded = model.load(self.model_type, self.trust_remote_code, **options)
        tokenizer = load_source_tokenizer(model, self.trust_remote_code)
        with torch.no_grad():
            return generation_loss(
                loaded.to(device).eval(), tokenizer, self.rows, self.batch_size, self.max_input_length
            )

    def _contrastive_loss(self, name: str, device: str) -> float:
        encoder = EncoderSpec(
            name,
            normalize_embeddings=True,
            devices=device,
            query_max_length=self.max_input_length,
            passage_max_length=self.max_input_length,
            cache_dir=self.cache_dir,
            trust_remote_code=self.trust_remote_code,
        ).load()
        groups = [sample_negatives(row, self.neg_number, self.seed, i) for i, row in enumerate(self.rows)]
        with torch.no_grad():
            return contrastive_loss(encoder, groups, self.batch_size)


def weights_from_losses(losses: Sequence[float], temperature: float) -> list[float]:
    """Return LM-Cocktail's merge weights: softmax(-loss / temperature)."""
    exponentials = np.exp((min(losses) - np.array(losses, np.float64)) / temperature)
    return (exponentials / exponentials.sum()).tolist()


def sample_negatives(group: Group, most: int, seed: int, index: int) -> Group:
    """Return a group with at most `most` of its negatives and, as in LM-Cocktail, its first positive alone.

    Args:
        group: the group with all its passages.
        most: most negatives; 0 for none.
        seed: seed of all samples.
        index: position of the group among the examples, which selects its random stream.

    Returns:
        The group with the sample, in the order of the original.
    """
    indices = sorted(generator("examples", seed, index).permutation(len(group.neg))[:most].tolist())
    return Group(group.query, group.pos[:1], tuple(group.neg[i] for i in indices), group.prompt)


def contrastive_loss(encoder: Encoder, groups: Sequence[Group], batch_size: int) -> float:
    """Return the mean InfoNCE loss (https://arxiv.org/abs/1807.03748) of the queries at LM-Cocktail's temperature.

    Args:
        encoder: embedding model with normalized embeddings.
        groups: groups with one positive each.
        batch_size: groups per batch; each query is contrasted with all passages of its batch.

    Returns:
        The mean over the queries.
    """
    from raybge.losses.functional import info_nce

    total = 0.0
    for start in range(0, len(groups), batch_size):
        batch = groups[start : start + batch_size]
        passages = [text for group in batch for text in group.pos + group.neg]
        ids = encoder.tokenize([encoder.query_text(g.query, g.prompt) for g in batch], encoder.query_max_length)
        ids += encoder.tokenize([encoder.passage_text(text) for text in passages], encoder.passage_max_length)
        e_ND = encoder.model.embed(ids, encoder.passage_max_length * batch_size)
        target_B = torch.tensor(np.cumsum([0, *(len(g.pos + g.neg) for g in batch[:-1])]), device=e_ND.device)
        total += float(info_nce(e_ND[: len(batch)], e_ND[len(batch) :], target_B, None, TEMPERATURE).sum())
    return total / len(groups)


def generation_loss(
    model: Any, tokenizer: Any, examples: Sequence[tuple[str, str]], batch_size: int, max_length: int
) -> float:
    """Return the cross-entropy of the outputs under a language model.

    Args:
        model: causal or encoder-decoder language model of transformers.
        tokenizer: its tokenizer.
        examples: (input, output) texts.
        batch_size: examples per batch.
        max_length: longest sequence in tokens.

    Returns:
        The mean over the examples of the mean over each output's tokens.

    Raises:
        UserError: an example's input leaves no room for its output.
    """
    seq2seq = bool(model.config.is_encoder_decoder)
    encode = _encode_pair if seq2seq else _encode_continuation
    encoded = [encode(tokenizer, *example, max_length) for example in examples]
    for number, (_, labels) in enumerate(encoded, start=1):
        if all(label == _IGNORED for label in labels):
            raise UserError(
                f"example {number}: its input fills --max_input_length {max_length}, which leaves no token of the "
                "output; raise --max_input_length, or shorten the input"
            )
    total = 0.0
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        ids_BT = _padded([ids for ids, _ in batch], tokenizer.pad_token_id)
        mask_BT = _padded([[1] * len(ids) for ids, _ in batch], 0)
        labels_BT = _padded([labels for _, labels in batch], _IGNORED).to(model.device)
        inputs = {"input_ids": ids_BT.to(model.device), "attention_mask": mask_BT.to(model.device)}
        if seq2seq:
            logits_BTV = model(**inputs, labels=labels_BT).logits
        else:  # each token is predicted from those before it
            logits_BTV, labels_BT = model(**inputs).logits[:, :-1], labels_BT[:, 1:]
        loss_BT = nn.functional.cross_entropy(
            logits_BTV.float().transpose(1, 2), labels_BT, reduction="none", ignore_index=_IGNORED
        )
        total += float((loss_BT.sum(dim=1) / (labels_BT != _IGNORED).sum(dim=1)).sum())
    return total / len(encoded)


def _encode_continuation(tokenizer: Any, text: str, output: str, max_length: int) -> tuple[list[int], list[int]]:
    """Return a decoder's token ids of input and output, and its labels: the output and the end-of-sequence token."""
    ids, input_ids = tokenizer.encode(f"{text} {output}"), tokenizer.encode(text)
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    shared = next((i for i, (a, b) in enumerate(zip(ids, input_ids, strict=False)) if a != b), len(input_ids))
    return ids[:max_length], ([_IGNORED] * shared + ids[shared:])[:max_length]


def _encode_pair(tokenizer: Any, text: str, output: str, max_length: int) -> tuple[list[int], list[int]]:
    """Return an encoder-decoder's token ids of the input and its labels."""
    return tokenizer.encode(text)[:max_length], tokenizer.encode(output)[:max_length]


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return rows_BT, padded on the right with `fill`."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
