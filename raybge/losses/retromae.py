"""RetroMAE pre-training of an encoder for retrieval, and DupMAE, which adds a bag-of-words loss.

RetroMAE: Xiao et al. 2022, https://arxiv.org/abs/2205.12035. The encoder reads a text with masked tokens and predicts
these. A decoder of one layer (`enhanced_decoder.py`) then predicts the whole text from the encoder's vector of the
first token, the CLS vector, and from a different random subset of the text's token embeddings for each position. This
input is so small that the CLS vector has to represent the text.
DupMAE: Xiao et al. 2023, https://arxiv.org/abs/2211.08769. The other tokens' vectors also predict the bag of words.

The steps of `RetroMAE.loss_parts`: count the predicted tokens of all workers; run encoder and decoder on chunks of
texts of similar length (`_run_chunk`), keeping only the vectors of predicted tokens; compute logits and loss block by
block (`_token_loss`, `_bow_loss`).

Letters in tensor names: B texts in a chunk, T tokens of its longest, D width, K predicted tokens, k a block of them,
V words of the vocabulary, W workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from transformers.modeling_outputs import BaseModelOutput

from raybge.data.masking import MaskedBatch, MaskedText
from raybge.losses.contrastive_model import GPU_TOKENS_PER_CHUNK
from raybge.losses.enhanced_decoder import EnhancedDecoder, visible_context
from raybge.losses.global_batch import gather_counts
from raybge.model.attention import use_fast_attention
from raybge.model.embedding import (
    EmbeddingModel,
    first_position,
    gathers_by_layer,
    max_positions,
    plan_chunks,
    position_tables,
    send,
)
from raybge.model.encoder import CPU_TOKENS_PER_CHUNK
from raybge.model.precision import autocast_without_cache
from raybge.util.errors import UserError

METHODS = ("retromae", "dupmae")
LOGITS_PER_BLOCK = 1 << 26  # numbers: 256 MiB in fp32
UNSEEN_SHARE = 0.05  # share of all words reserved for words that do not occur in the counted part of the texts
_DEFAULT_POSITIONS = 512  # of the decoder, if the encoder has no table of positions and states no maximal length

# Input of a worker without rows, which takes part in the gradient: one token, none of it predicted.
_EMPTY_TEXT = MaskedText(
    np.zeros(1, np.int32), np.zeros(1, bool), np.zeros(1, np.int32), np.zeros(1, bool),
    np.zeros((1, 1), np.uint8), np.zeros(1, np.uint8),
)  # fmt: skip


@dataclass(frozen=True)
class LossParts:
    """The terms of the loss as scalars, before any weight: this worker's share of each mean, times W.

    Args:
        encoder: mean over all tokens that are masked for the encoder.
        decoder: mean over all tokens except special ones.
        bow: mean over texts; None without the bag-of-words loss.
    """

    encoder: Tensor
    decoder: Tensor
    bow: Tensor | None


class RetroMAE(nn.Module):
    """A masked language model with the enhanced decoder: maps a MaskedBatch to the worker's share of the loss.

    The language model's head predicts the masked tokens of the encoder and the tokens of the decoder. The decoder
    predicts every token of a text except special ones, as in the reference implementation: the CLS vector is its input,
    and the token that ends a text is known.

    Args:
        masked_lm: a masked language model of transformers, which is taken apart.
        method: "retromae" or "dupmae".
        bow_loss_weight: weight of the bag-of-words loss.
        pad_to_multiple_of: round the length of a chunk of texts up to a multiple of this.

    Raises:
        UserError: another method, or a model without access to its token embeddings.
    """

    main_input_name = "batch"  # its tokens are those that transformers' Trainer counts

    def __init__(
        self,
        masked_lm: Any,
        method: str = "retromae",
        bow_loss_weight: float = 0.1,
        pad_to_multiple_of: int | None = None,
    ):
        super().__init__()
        if method not in METHODS:
            raise UserError(f"--pretrain_method {method}: expected one of {', '.join(METHODS)}")
        self.method = method
        self.bow_loss_weight = bow_loss_weight
        self.pad_to_multiple_of = pad_to_multiple_of
        _check_embeddings(masked_lm.base_model)
        self.embedding = EmbeddingModel(masked_lm.base_model, "cls", normalize=False)
        # What remains of the language model is its head, which is called with hidden states.
        setattr(masked_lm, masked_lm.base_model_prefix, _HiddenStates())
        self.head = masked_lm
        backbone: Any = self.embedding.backbone
        own = 0 if position_tables(backbone) else max_positions(backbone) or _DEFAULT_POSITIONS
        self.decoder = EnhancedDecoder(backbone.config, own)

    def forward(self, batch: MaskedBatch) -> Tensor:
        """Compute this worker's share of the loss: the sum of its parts, the bag of words with its weight. Collective.

        Data-parallel training averages gradients over workers, so each part is the sum over this worker's tokens,
        divided by the number of tokens of all workers and multiplied by the number of workers: the result is the
        gradient of one worker with the whole batch. A worker may have no text, but has to call it.

        Args:
            batch: this worker's texts.

        Returns:
            A scalar.
        """
        parts = self.loss_parts(batch)
        loss = parts.encoder + parts.decoder
        return loss if parts.bow is None else loss + self.bow_loss_weight * parts.bow

    def loss_parts(self, batch: MaskedBatch) -> LossParts:
        """Compute the terms of the loss. Collective."""
        texts = batch.texts or [_EMPTY_TEXT]
        device = next(self.parameters()).device
        masked = [int(text.masked_T.sum()) for text in texts]
        decoded = [int(_decoded_tokens(text).sum()) for text in texts]
        tokens = CPU_TOKENS_PER_CHUNK if device.type == "cpu" else GPU_TOKENS_PER_CHUNK
        chunks = plan_chunks([len(text.token_T) for text in texts], tokens)
        own_counts = [sum(masked), sum(decoded), sum(map(bool, decoded)), len(chunks)]
        *counts_W, chunks_W = gather_counts(own_counts, device)
        share = [len(count_W) / max(1, sum(count_W)) for count_W in counts_W]
        if gathers_by_layer(self.embedding):
            fillers = range(len(texts), len(texts) + max(chunks_W) - len(chunks))
            chunks += [[row] for row in fillers]
            texts = [*texts, *(_EMPTY_TEXT for _ in fillers)]
        with autocast_without_cache(device):
            outputs = [self._run_chunk([texts[row] for row in rows]) for rows in chunks]
        sorted_texts = [texts[row] for rows in chunks for row in rows]
        encoder_KD, decoder_KD, word_KD = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        encoder = self._token_loss(encoder_KD, [text.token_T[text.masked_T] for text in sorted_texts])
        decoder = self._token_loss(decoder_KD, [text.token_T[_decoded_tokens(text)] for text in sorted_texts])
        bow = None
        if self.method == "dupmae":
            bow = share[2] * self._bow_loss(word_KD, [text.token_T[_decoded_tokens(text)] for text in sorted_texts])
        return LossParts(share[0] * encoder, share[1] * decoder, bow)

    def _run_chunk(self, texts: list[MaskedText]) -> tuple[Tensor, Tensor, Tensor]:
        """Run encoder and decoder on a chunk.

        Args:
            texts: B texts.

        Returns:
            encoder_KD of the masked tokens, decoder_KD of the decoded tokens, and encoder_KD of the decoded tokens,
            (0, D) without the bag-of-words loss.
        """
        rows, multiple = range(len(texts)), self.pad_to_multiple_of
        backbone: Any = self.embedding.backbone
        shown_BT, mask_BT = self.embedding.pad([text.shown_T for text in texts], rows, multiple)
        token_BT, _ = self.embedding.pad([text.token_T for text in texts], rows, multiple)
        h_BTD = backbone(input_ids=shown_BT, attention_mask=mask_BT).last_hidden_state
        position_TD = self._positions(token_BT.shape[1])
        token_BTD = backbone.embeddings(input_ids=token_BT)
        if self.decoder.positions is not None:
            token_BTD = token_BTD + position_TD
        d_BTD = self.decoder(
            h_BTD[:, 0], token_BTD, position_TD, visible_context(texts, token_BT.shape[1], token_BT.device)
        )
        masked_K = _flat_indices([text.masked_T for text in texts], token_BT)
        decoded_K = _flat_indices([_decoded_tokens(text) for text in texts], token_BT)
        h_KD, d_KD = h_BTD.flatten(0, 1), d_BTD.flatten(0, 1)
        return h_KD[masked_K], d_KD[decoded_K], h_KD[decoded_K if self.method == "dupmae" else decoded_K[:0]]

    def _positions(self, width: int) -> Tensor:
        """Return the position embeddings of the first `width` tokens of a text, (T, D)."""
        if self.decoder.positions is not None:
            return self.decoder.positions.weight[:width]
        backbone = self.embedding.backbone
        first = first_position(backbone)
        return position_tables(backbone)[0].weight[first : first + width]

    def _logits(self, x_kD: Tensor) -> Tensor:
        """Return the head's logits_kV, fp32."""
        return self.head(inputs_embeds=x_kD[None]).logits[0].float()

    def _token_loss(self, x_KD: Tensor, labels: list[np.ndarray]) -> Tensor:
        """Return the sum of the cross-entropies of K tokens; `labels` are their ids, text by text."""
        sizes = _block_sizes([1] * len(x_KD), self._block)
        label_K = send(np.concatenate(labels).astype(np.int64), x_KD.device)
        blocks = label_K.split(sizes)
        return self._sum(lambda x_kD, i: cross_entropy(self._logits(x_kD), blocks[i], reduction="sum"), x_KD, sizes)

    def _bow_loss(self, x_KD: Tensor, tokens: list[np.ndarray]) -> Tensor:
        """Return the sum over texts of the bag-of-words loss of DupMAE.

        The logits of a text are the maximum over its tokens for each word of the vocabulary. The loss is the sum of the
        cross-entropies of each distinct word of the text, divided by the number of its tokens, as in the reference
        implementation.

        Args:
            x_KD: encoder vectors of all tokens except special ones, text by text.
            tokens: ids of these tokens, one array per text.

        Returns:
            A scalar.
        """
        tokens = [token_T for token_T in tokens if len(token_T)]
        lengths = [len(token_T) for token_T in tokens]
        sizes = _block_sizes(lengths, self._block)
        text_ends = np.searchsorted(np.cumsum(lengths), np.cumsum(sizes), side="right")
        starts = [0, *text_ends.tolist()]

        def loss(x_kD: Tensor, i: int) -> Tensor:
            rows = range(starts[i], starts[i + 1])
            parts = self._logits(x_kD).split([lengths[row] for row in rows])
            total = x_kD.new_zeros((), dtype=torch.float32)
            for row, logits_TV in zip(rows, parts, strict=True):
                words = send(np.unique(tokens[row]).astype(np.int64), x_kD.device)
                total = total - log_softmax(logits_TV.amax(dim=0), dim=-1)[words].sum() / lengths[row]
            return total

        return self._sum(loss, x_KD, sizes)

    @property
    def _block(self) -> int:
        """Tokens whose logits are held at a time."""
        return max(1, LOGITS_PER_BLOCK // self.vocabulary)

    def _sum(self, loss: Callable[[Tensor, int], Tensor], x_KD: Tensor, sizes: list[int]) -> Tensor:
        """Return the sum of `loss(x_kD, i)` over blocks of the given sizes."""
        if torch.is_grad_enabled():
            return _BlockSum.apply(loss, sizes, x_KD, *(p for p in self.head.parameters() if p.requires_grad))
        blocks = x_KD.split(sizes)
        return sum((loss(x_kD, i) for i, x_kD in enumerate(blocks)), x_KD.new_zeros((), dtype=torch.float32))

    def init_output_bias(self, count_V: np.ndarray) -> None:
        """Initialize a new head's bias with the log of each word's frequency, smoothed by UNSEEN_SHARE.

        Without it the first hundreds of steps learn these frequencies alone, and learn them by moving all vectors into
        one direction, since steps of a bias are too small (Meister et al. 2023, https://arxiv.org/abs/2212.09686). A
        head whose last layer has no bias stays as it is.

        Args:
            count_V: occurrences of each word of the vocabulary in a part of the texts; if all are 0, nothing changes.
        """
        bias_V = getattr(self.head.get_output_embeddings(), "bias", None)
        if bias_V is None or not count_V.any():
            return
        share_V = (1 - UNSEEN_SHARE) * count_V / count_V.sum() + UNSEEN_SHARE / len(count_V)
        with torch.no_grad():
            bias_V.copy_(torch.from_numpy(np.log(share_V)))

    @property
    def vocabulary(self) -> int:
        """Number of words of the head, V."""
        return int(self.head.config.vocab_size)

    def prepare_for_training(self) -> None:
        """Switch the encoder to the fast attention and the fast dropout."""
        use_fast_attention(self.embedding.backbone)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoint the backbone's layers; transformers' Trainer calls it for `--gradient_checkpointing`."""
        self.embedding.backbone.gradient_checkpointing_enable(*args, **kwargs)


class _HiddenStates(nn.Module):
    """Replacement of a language model's encoder: returns its input as the hidden states."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class _BlockSum(torch.autograd.Function):
    """Sum of a loss over blocks of rows.

    Each block's gradient is computed in the forward pass, so no logits are kept for the backward pass and none are
    computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Callable[[Tensor, int], Tensor], sizes: list[int], x_KD: Tensor, *parameters: Tensor
    ) -> Tensor:
        total = x_KD.new_zeros((), dtype=torch.float32)
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        grad_x = []
        for i, x_kD in enumerate(x_KD.split(sizes)):
            with torch.enable_grad():
                x_kD = x_kD.detach().requires_grad_()
                value = loss(x_kD, i)
            # model families that do not tie their head have a bias without use
            own, *block_grads = torch.autograd.grad(value, [x_kD, *parameters], materialize_grads=True)
            grad_x.append(own)
            for grad, block_grad in zip(grads, block_grads, strict=True):
                grad += block_grad
            total += value.detach()
        ctx.save_for_backward(torch.cat([x_KD[:0], *grad_x]), *grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * grads[0] for grad in ctx.saved_tensors)


def _decoded_tokens(text: MaskedText) -> np.ndarray:
    """Return a bool array of the tokens that the decoder predicts: never the first, which the CLS vector replaces."""
    decoded_T = text.ordinary_T.copy()
    decoded_T[0] = False
    return decoded_T


def _flat_indices(marks: list[np.ndarray], token_BT: Tensor) -> Tensor:
    """Return the indices of marked tokens in the flattened padded chunk; `marks` is one bool array per text."""
    marked_BT = np.zeros(token_BT.shape, bool)
    for b, mark_T in enumerate(marks):
        marked_BT[b, : len(mark_T)] = mark_T
    return send(np.flatnonzero(marked_BT), token_BT.device)


def _block_sizes(lengths: Sequence[int], limit: int) -> list[int]:
    """Return the tokens of each block when texts of these lengths are joined into blocks of about `limit` tokens."""
    ends = np.cumsum(lengths, dtype=np.int64)
    last = np.flatnonzero(np.diff((ends - 1) // limit, append=-1))
    sizes: list[int] = np.diff(ends[last], prepend=0).tolist()
    return sizes


def _check_embeddings(backbone: Any) -> None:
    """Raise UserError for a model whose token embeddings are not accessible in the width of its vectors."""
    layer = getattr(backbone, "embeddings", None)
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.int64, device=next(backbone.parameters()).device)
        width = None if layer is None else layer(input_ids=token).shape[-1]
    if width != backbone.config.hidden_size:
        raise UserError(
            f"--model_name_or_path: pre-training requires token embeddings in the width of the vectors, which "
            f"{type(backbone).__name__} does not provide: expected a model like BERT, RoBERTa, XLM-R or DistilBERT"
        )
