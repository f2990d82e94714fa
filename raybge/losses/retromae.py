"""RetroMAE, pre-training of an encoder for retrieval (Xiao et al. 2022, https://arxiv.org/abs/2205.12035), and DupMAE,
which adds a bag of words (Xiao et al. 2023, https://arxiv.org/abs/2211.08769).

The encoder reads a text of which words are hidden, and is asked for those. Then a decoder of one layer is asked for the
whole text: it has the encoder's vector of the first token, the CLS vector, and sees of the text's own token embeddings,
for each position, another choice. So little is left to it that the CLS vector must hold what the text is about.

Letters in tensor names: B texts in a chunk, T tokens of its longest, D width, R choices of hidden words, S bytes that
hold a bit for each token, K tokens asked for, k a block of them, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, log_softmax
from transformers.modeling_outputs import BaseModelOutput

from raybge.data.masking import MaskedBatch, MaskedText
from raybge.losses.contrastive_model import GPU_TOKENS_PER_CHUNK
from raybge.losses.objective import gather_counts
from raybge.model.attention import attention, use_fast_attention
from raybge.model.dropout import Dropout
from raybge.model.embedding import EmbeddingModel, first_position, max_positions, plan_chunks, position_tables
from raybge.model.encoder import CPU_TOKENS_PER_CHUNK
from raybge.util.errors import UserError

METHODS = ("retromae", "dupmae")
LOGITS_AT_ONCE = 1 << 26  # numbers: 256 MiB in fp32
UNSEEN = 0.05  # of all words, those that the part of the texts that was counted does not have
_OWN_POSITIONS = 512  # of a decoder whose encoder has no table of positions and says no length

# What a worker without rows computes, to take part in the gradient: one token, of which nothing is asked.
_NOTHING = MaskedText(
    np.zeros(1, np.int32), np.zeros(1, bool), np.zeros(1, np.int32), np.zeros(1, bool),
    np.zeros((1, 1), np.uint8), np.zeros(1, np.uint8),
)  # fmt: skip


@dataclass(frozen=True)
class LossParts:
    """The loss's parts as scalars, before any weight: this worker's share of each mean, times the number of workers.

    `encoder`: mean over all tokens that were hidden from the encoder. `decoder`: mean over all tokens but special ones.
    `bow`: mean over texts, None without a bag of words.
    """

    encoder: Tensor
    decoder: Tensor
    bow: Tensor | None


class EnhancedDecoder(nn.Module):
    """A transformer layer that is asked for each token of a text, by the position alone and the text's CLS vector.

    The query of position i is the CLS vector plus i's position embedding. Keys and values are the CLS vector, in place
    of the first token, and the token embeddings with their positions. Width, heads, dropout and initial weights are
    the encoder's, as in the recipe.

    Args:
        config: the encoder's.
        positions: rows of a table of positions of its own, 0 for none: for encoders that turn vectors by an angle.
    """

    def __init__(self, config: Any, positions: int = 0):
        super().__init__()
        dim = config.hidden_size
        eps = _first(config, 1e-12, "layer_norm_eps", "norm_eps")
        self.heads = config.num_attention_heads
        self.attention_dropout = _first(config, 0.0, "attention_probs_dropout_prob", "attention_dropout")
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.widen, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = Dropout(_first(config, 0.0, "hidden_dropout_prob", "dropout", "mlp_dropout"))
        self.positions = nn.Embedding(positions, dim) if positions else None
        for parameter in self.parameters():
            if parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=_first(config, 0.02, "initializer_range"))
        self.middle_norm, self.norm = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)

    def forward(self, cls_BD: Tensor, token_BTD: Tensor, position_TD: Tensor, visible_BTT: Tensor) -> Tensor:
        """What it makes of each position, (B, T, D).

        Args:
            token_BTD: token embeddings with their positions; the first token's is not looked at.
            position_TD: position embeddings alone.
            visible_BTT: bool, which context (last) each position sees; one at least.
        """
        query_BTD = cls_BD[:, None] + position_TD
        context_BTD = torch.cat([cls_BD[:, None], token_BTD[:, 1:]], dim=1)
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query_BTD), (self.key, context_BTD), (self.value, context_BTD))
        )
        dropout = self.attention_dropout if self.training else 0.0
        seen_BTHd, _ = attention(self, q, k, v, visible_BTT[:, None], dropout, is_causal=False)
        h_BTD = self.middle_norm(query_BTD + self.dropout(self.out(seen_BTHd.flatten(2))))
        return self.norm(h_BTD + self.dropout(self.narrow(gelu(self.widen(h_BTD)))))


class RetroMAE(nn.Module):
    """A masked language model with the decoder: maps a MaskedBatch to the worker's share of the loss.

    Both the encoder's hidden words and the decoder's tokens are told by the language model's one head. The decoder is
    asked for every token of a text but special ones, as in the recipe: the CLS vector is given, and what ends a text is
    known.

    Args:
        masked_lm: of transformers; it is taken apart. UserError for a kind whose token embeddings are not to be had.
        method: "retromae", or "dupmae" for the bag of words too.
        bow_loss_weight: of that.
        pad_to_multiple_of: round the length of a chunk of texts up to a multiple of this.
    """

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
        # What is left of the language model is its head: called with hidden states, it takes them for the encoder's.
        setattr(masked_lm, masked_lm.base_model_prefix, _Given())
        self.head = masked_lm
        backbone: Any = self.embedding.backbone
        own = 0 if position_tables(backbone) else max_positions(backbone) or _OWN_POSITIONS
        self.decoder = EnhancedDecoder(backbone.config, own)

    def forward(self, batch: MaskedBatch) -> Tensor:
        """The share of the loss as a scalar: the sum of its parts, the bag of words by its weight.

        Data-parallel training averages gradients over workers, so each part is the sum over this worker's tokens,
        divided by the number of tokens of all workers and multiplied by the number of workers: the result is the
        gradient of one worker with the whole batch. A worker may have no text, as long as all call it.
        """
        parts = self.parts(batch)
        loss = parts.encoder + parts.decoder
        return loss if parts.bow is None else loss + self.bow_loss_weight * parts.bow

    def parts(self, batch: MaskedBatch) -> LossParts:
        """The parts of the loss. Collective."""
        texts = batch.texts or [_NOTHING]
        device = next(self.parameters()).device
        hidden = [int(text.masked_T.sum()) for text in texts]
        asked = [int(_asked(text).sum()) for text in texts]
        mine = [sum(hidden), sum(asked), sum(map(bool, asked))]
        share = [len(of_W) / max(1, sum(of_W)) for of_W in gather_counts(mine, device)]

        tokens = CPU_TOKENS_PER_CHUNK if device.type == "cpu" else GPU_TOKENS_PER_CHUNK
        chunks = plan_chunks([len(text.token_T) for text in texts], tokens)
        found = [self._chunk([texts[row] for row in rows]) for rows in chunks]
        sorted_texts = [texts[row] for rows in chunks for row in rows]
        encoder_KD, decoder_KD, ordinary_KD = (torch.cat(each) for each in zip(*found, strict=True))
        encoder = self._token_loss(encoder_KD, [text.token_T[text.masked_T] for text in sorted_texts])
        decoder = self._token_loss(decoder_KD, [text.token_T[_asked(text)] for text in sorted_texts])
        bow = None
        if self.method == "dupmae":
            bow = share[2] * self._bow_loss(ordinary_KD, [text.token_T[_asked(text)] for text in sorted_texts])
        return LossParts(share[0] * encoder, share[1] * decoder, bow)

    def _chunk(self, texts: list[MaskedText]) -> tuple[Tensor, Tensor, Tensor]:
        """(K, D) of the texts together: encoder's of hidden tokens, decoder's of all that are asked for, encoder's of
        those.
        """
        rows, multiple = range(len(texts)), self.pad_to_multiple_of
        backbone: Any = self.embedding.backbone
        shown_BT, real_BT = self.embedding.pad([text.shown_T for text in texts], rows, multiple)
        token_BT, _ = self.embedding.pad([text.token_T for text in texts], rows, multiple)
        h_BTD = backbone(input_ids=shown_BT, attention_mask=real_BT).last_hidden_state
        position_TD = self._positions(token_BT.shape[1])
        token_BTD = backbone.embeddings(input_ids=token_BT)
        if self.decoder.positions is not None:
            token_BTD = token_BTD + position_TD
        d_BTD = self.decoder(
            h_BTD[:, 0], token_BTD, position_TD, visible_context(texts, token_BT.shape[1], token_BT.device)
        )
        masked_K, asked_K = (
            _places([mark(text) for text in texts], token_BT) for mark in (lambda text: text.masked_T, _asked)
        )
        h_KD, d_KD = h_BTD.flatten(0, 1), d_BTD.flatten(0, 1)
        return h_KD[masked_K], d_KD[asked_K], h_KD[asked_K if self.method == "dupmae" else asked_K[:0]]

    def _positions(self, width: int) -> Tensor:
        """Position embeddings of the first tokens of a text, (T, D)."""
        if self.decoder.positions is not None:
            return self.decoder.positions.weight[:width]
        backbone = self.embedding.backbone
        first = first_position(backbone)
        return position_tables(backbone)[0].weight[first : first + width]

    def _logits(self, x_kD: Tensor) -> Tensor:
        return self.head(inputs_embeds=x_kD[None]).logits[0].float()

    def _token_loss(self, x_KD: Tensor, labels: list[np.ndarray]) -> Tensor:
        """The sum of the cross entropies of K tokens."""
        sizes = _block_sizes([1] * len(x_KD), self._block)
        label_K = torch.from_numpy(np.concatenate(labels).astype(np.int64)).to(x_KD.device)
        blocks = label_K.split(sizes)
        return self._sum(lambda x_kD, i: cross_entropy(self._logits(x_kD), blocks[i], reduction="sum"), x_KD, sizes)

    def _bow_loss(self, x_KD: Tensor, tokens: list[np.ndarray]) -> Tensor:
        """The sum over texts of how little a text's vectors say of what words it has.

        The head's numbers for each word, the largest over the text's tokens, are taken as those of one choice among all
        words; the loss is the sum of the cross entropies of each different word of the text, over the number of its
        tokens, as the recipe has it. Tokens and vectors are those of the text without its special tokens.
        """
        tokens = [token_T for token_T in tokens if len(token_T)]
        lengths = [len(token_T) for token_T in tokens]
        sizes = _block_sizes(lengths, self._block)
        texts_of = np.searchsorted(np.cumsum(lengths), np.cumsum(sizes), side="right")
        starts = [0, *texts_of.tolist()]

        def loss(x_kD: Tensor, i: int) -> Tensor:
            held = range(starts[i], starts[i + 1])
            parts = self._logits(x_kD).split([lengths[row] for row in held])
            total = x_kD.new_zeros((), dtype=torch.float32)
            for row, logits_TV in zip(held, parts, strict=True):
                words = torch.from_numpy(np.unique(tokens[row]).astype(np.int64)).to(x_kD.device)
                total = total - log_softmax(logits_TV.amax(dim=0), dim=-1)[words].sum() / lengths[row]
            return total

        return self._sum(loss, x_KD, sizes)

    @property
    def _block(self) -> int:
        """Tokens whose logits are held at a time."""
        return max(1, LOGITS_AT_ONCE // self.vocabulary)

    def _sum(self, loss: Callable[[Tensor, int], Tensor], x_KD: Tensor, sizes: list[int]) -> Tensor:
        if torch.is_grad_enabled():
            return _BlockSum.apply(loss, sizes, x_KD, *(p for p in self.head.parameters() if p.requires_grad))
        blocks = x_KD.split(sizes)
        return sum((loss(x_kD, i) for i, x_kD in enumerate(blocks)), x_KD.new_zeros((), dtype=torch.float32))

    def init_output_bias(self, count_V: np.ndarray) -> None:
        """Let a new head begin with each word's share of all words, of which UNSEEN goes to all words alike.

        Else the first hundreds of steps teach that alone, and teach it by drawing all vectors into one direction, for
        steps of a bias are too small (Meister et al. 2023, https://arxiv.org/abs/2212.09686). A head whose last layer
        has no bias stays as it is.

        Args:
            count_V: how often each word of the vocabulary is in a part of the texts; nothing happens if none is.
        """
        bias_V = getattr(self.head.get_output_embeddings(), "bias", None)
        if bias_V is None or not count_V.any():
            return
        share_V = (1 - UNSEEN) * count_V / count_V.sum() + UNSEEN / len(count_V)
        with torch.no_grad():
            bias_V.copy_(torch.from_numpy(np.log(share_V)))

    @property
    def vocabulary(self) -> int:
        """Words that the head knows, V."""
        return int(self.head.config.vocab_size)

    def prepare_for_training(self) -> None:
        """Take the fast attention and the fast dropout."""
        use_fast_attention(self.embedding.backbone)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.embedding.backbone.gradient_checkpointing_enable(*args, **kwargs)


def visible_context(texts: Sequence[MaskedText], width: int, device: torch.device) -> Tensor:
    """Which context each position of the decoder sees, (B, T, T) bool with T = `width`: the tokens that its choice has,
    never itself, and always the first, where the CLS vector stands.
    """
    bits_BTS = np.zeros((len(texts), width, -(-width // 8)), np.uint8)
    for b, text in enumerate(texts):
        own_TS = text.visible_RS[text.pick_T]
        bits_BTS[b, : own_TS.shape[0], : own_TS.shape[1]] = own_TS
    visible_BTT = torch.from_numpy(np.unpackbits(bits_BTS, axis=2, count=width).view(bool)).to(device)
    visible_BTT.diagonal(dim1=1, dim2=2).fill_(False)
    visible_BTT[:, :, 0] = True
    return visible_BTT


class _Given(nn.Module):
    """In the place of a language model's encoder: what it was given are its hidden states."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class _BlockSum(torch.autograd.Function):
    """The sum of a loss over blocks of rows. Each block's gradient is made in the forward pass, so that no logits are
    kept for the backward pass, and none are computed twice.
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
            # a family that does not tie its head has a bias that nothing uses
            own, *found = torch.autograd.grad(value, [x_kD, *parameters], materialize_grads=True)
            grad_x.append(own)
            for grad, each in zip(grads, found, strict=True):
                grad += each
            total += value.detach()
        ctx.save_for_backward(torch.cat([x_KD[:0], *grad_x]), *grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * grads[0] for grad in ctx.saved_tensors)


def _asked(text: MaskedText) -> np.ndarray:
    """Tokens that the decoder is asked for: never the first, whose place the CLS vector has."""
    asked_T = text.ordinary_T.copy()
    asked_T[0] = False
    return asked_T


def _places(marks: list[np.ndarray], token_BT: Tensor) -> Tensor:
    """Where the marked tokens stand in a padded chunk read row by row."""
    marked_BT = np.zeros(token_BT.shape, bool)
    for b, mark_T in enumerate(marks):
        marked_BT[b, : len(mark_T)] = mark_T
    return torch.from_numpy(np.flatnonzero(marked_BT)).to(token_BT.device)


def _block_sizes(lengths: Sequence[int], most: int) -> list[int]:
    """Tokens of each block when texts of so many are put together while they are about `most` or fewer."""
    ends = np.cumsum(lengths, dtype=np.int64)
    last = np.flatnonzero(np.diff((ends - 1) // most, append=-1))
    return np.diff(ends[last], prepend=0).tolist()


def _first(config: Any, otherwise: float, *names: str) -> float:
    """What a configuration says under the first of the names that it has."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), otherwise)


def _check_embeddings(backbone: Any) -> None:
    layer = getattr(backbone, "embeddings", None)
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.int64, device=next(backbone.parameters()).device)
        width = None if layer is None else layer(input_ids=token).shape[-1]
    if width != backbone.config.hidden_size:
        raise UserError(
            f"{type(backbone).__name__} does not give its token embeddings in the width of its vectors, as "
            "pre-training needs them: expected a model like BERT, RoBERTa, XLM-R or DistilBERT"
        )
