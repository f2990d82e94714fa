"""The network: a transformer with pooling and normalization, run on texts of different lengths.

Letters in tensor names: N input texts, B texts in a chunk, T tokens of its longest, D width of a vector.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raybge.model.attention import PackedTexts
from raybge.model.folder import POOLINGS
from raybge.model.precision import autocast_without_cache
from raybge.util.errors import UserError

_FILLER = np.zeros(1, dtype=np.int64)  # a text of one token, which every model has
SUB_BATCH_MULTIPLE = 16  # the length of a sub-batch is padded to a multiple of this many tokens


class EmbeddingModel(nn.Module):
    """A transformer that turns each text into one vector.

    Args:
        backbone: a transformers model whose output has `last_hidden_state`.
        pooling: "cls" (first token), "mean" (over the text's tokens) or "last_token".
        normalize: scale each vector to length 1.

    Raises:
        UserError: another pooling, or "cls" for a decoder.
    """

    def __init__(self, backbone: nn.Module, pooling: str = "cls", normalize: bool = True) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise UserError(f"pooling {pooling!r}: expected one of {', '.join(POOLINGS)}")
        if pooling == "cls" and is_causal(backbone):
            raise UserError(
                "pooling 'cls': this model is a decoder, whose first token does not attend to the rest of the text; "
                "expected last_token or mean"
            )
        self.backbone = backbone
        self.pooling = pooling
        self.normalize = normalize
        self.packs = False  # see raybge/model/packing.py
        pooler = getattr(backbone, "pooler", None)
        if isinstance(pooler, nn.Module):
            # unused here: data-parallel training would wait for its gradient
            pooler.requires_grad_(False)

    @property
    def dim(self) -> int:
        """Width of a vector, D."""
        return int(self._config.get_text_config().hidden_size)

    @property
    def _config(self) -> Any:
        return self.backbone.config

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Embed one padded chunk.

        Args:
            input_ids_BT: token ids, padded on the right.
            attention_mask_BT: 1 for a token, 0 for padding.

        Returns:
            e_BD in fp32, whatever precision the backbone runs in.
        """
        h_BTD = self.backbone(input_ids=input_ids_BT, attention_mask=attention_mask_BT).last_hidden_state
        if self.pooling == "cls":
            e_BD = h_BTD[:, 0].float()
        elif self.pooling == "mean":
            mask_BT1 = attention_mask_BT.unsqueeze(-1)
            e_BD = (h_BTD.float() * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1).clamp(min=1)
        else:
            length_B = attention_mask_BT.sum(dim=1)
            h_BD = h_BTD[torch.arange(len(length_B), device=h_BTD.device), length_B.clamp(min=1) - 1]
            # a text without tokens ("" for tokenizers without special tokens) becomes the zero vector
            e_BD = h_BD.float().where(length_B.unsqueeze(1) > 0, 0.0)
        return nn.functional.normalize(e_BD, dim=-1) if self.normalize else e_BD

    def forward_packed(self, input_ids_1T: Tensor, position_ids_1T: Tensor, texts: PackedTexts) -> Tensor:
        """Embed texts that are concatenated into one row of tokens.

        Args:
            input_ids_1T: token ids of all texts.
            position_ids_1T: positions, which start again at the model's first position in each text.
            texts: bounds of the texts.

        Returns:
            e_BD like `forward`.
        """
        # transformers passes a mask of four dimensions on as it is; the attention ignores it.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids_1T.device)
        h_TD = self.backbone(
            input_ids=input_ids_1T, position_ids=position_ids_1T, attention_mask=mask, packed=texts
        ).last_hidden_state[0]
        start_B, end_B = texts.bound_E[:-1], texts.bound_E[1:]
        if self.pooling == "cls":
            e_BD = h_TD[start_B].float()
        elif self.pooling == "mean":
            length_B = end_B - start_B
            # Each token has a place of its own: sums by atomic additions would differ in their last bits each time.
            shift_B = torch.arange(len(length_B), device=h_TD.device) * texts.longest - start_B
            first_T = torch.repeat_interleave(shift_B, length_B, output_size=len(h_TD))
            place_T = first_T + torch.arange(len(h_TD), device=h_TD.device)
            padded_ND = h_TD.new_zeros(len(length_B) * texts.longest, h_TD.shape[1], dtype=torch.float32)
            padded_ND = padded_ND.index_copy(0, place_T, h_TD.float())
            e_BD = padded_ND.unflatten(0, (-1, texts.longest)).sum(dim=1) / length_B.unsqueeze(1)
        else:
            e_BD = h_TD[end_B - 1].float()
        return nn.functional.normalize(e_BD, dim=-1) if self.normalize else e_BD

    def freeze_positions(self) -> None:
        """Freeze the table of position embeddings; UserError if the model has none."""
        tables = position_tables(self.backbone)
        if not tables:
            raise UserError("--fix_position_embedding: this model has no table of position embeddings")
        for table in tables:
            table.requires_grad_(False)

    def embed(
        self,
        token_ids: Sequence[Sequence[int] | np.ndarray],
        tokens_per_chunk: int,
        pad_to_multiple_of: int | None = None,
        sub_batch_size: int | None = None,
        min_chunks: int = 0,
        sub_batch_tokens: int | None = None,
    ) -> Tensor:
        """Embed tokenized texts in chunks of similar length, which need little padding.

        Differentiable: the gradient is that of one padded batch. The same list of texts gives the same chunks and so
        the same bits; a text's last bits may depend on the other texts of its chunk.

        With `sub_batch_size` or `sub_batch_tokens` only one chunk's activations are held at a time: the forward pass
        keeps none, and the backward pass computes each chunk again, with the same dropout. It is the memory bound of
        GradCache, https://arxiv.org/abs/2101.06983, by activation checkpointing of each chunk.

        Args:
            token_ids: N texts as token ids with their special tokens, none longer than the model's maximal length.
            tokens_per_chunk: maximal number of tokens in a chunk, with padding; a longer text runs alone.
            pad_to_multiple_of: round a chunk's length up to a multiple of this.
            sub_batch_size: maximal number of texts in a chunk; None: activations of all chunks are held.
            min_chunks: chunks to run at least; those that the texts do not fill have one token, whose vector is
                dropped and gives every weight a gradient of zero.
            sub_batch_tokens: maximal number of tokens in a chunk, with all its padding, in place of
                `tokens_per_chunk`; a longer text runs alone.

        Returns:
            e_ND in fp32, in the order of the input; (0, D) for no text.
        """
        recomputes = sub_batch_size is not None or sub_batch_tokens is not None
        if recomputes and not pad_to_multiple_of:
            # Chunks of many different sizes fragment the heap.
            pad_to_multiple_of = SUB_BATCH_MULTIPLE
        lengths = [len(ids) for ids in token_ids]
        chunks = self.plan(lengths, tokens_per_chunk, pad_to_multiple_of, sub_batch_size, sub_batch_tokens)
        device = next(self.parameters()).device
        texts = len(token_ids)
        fillers = range(texts, texts + min_chunks - len(chunks))
        chunks += [[row] for row in fillers]
        if not chunks:
            return torch.zeros(0, self.dim, device=device)
        token_ids = [*token_ids, *(_FILLER for _ in fillers)]
        # A text without tokens cannot be packed.
        packs = self.packs and all(map(len, token_ids))
        run: Any = self.forward_packed if packs else self

        if recomputes:
            run = functools.partial(checkpoint, self._run_alone, run, use_reentrant=False)
        inputs = (
            self.pack(token_ids, rows) if packs else self.pad(token_ids, rows, pad_to_multiple_of) for rows in chunks
        )
        with autocast_without_cache(device):
            e_sorted_ND = torch.cat([run(*chunk) for chunk in inputs])
        position_N = np.empty(len(token_ids), dtype=np.int64)
        position_N[[row for rows in chunks for row in rows]] = np.arange(len(token_ids))
        return e_sorted_ND[send(position_N[:texts], device)]

    def embed_chunk(self, token_ids: Sequence[np.ndarray]) -> Tensor:
        """Return e_BD of the texts of one chunk, packed if the model packs; for inference."""
        rows = range(len(token_ids))
        # A text without tokens cannot be packed.
        if self.packs and all(map(len, token_ids)):
            return self.forward_packed(*self.pack(token_ids, rows))
        e_BD: Tensor = self(*self.pad(token_ids, rows))
        return e_BD

    def plan(
        self,
        lengths: Sequence[int],
        tokens_per_chunk: int,
        pad_to_multiple_of: int | None = None,
        sub_batch_size: int | None = None,
        sub_batch_tokens: int | None = None,
    ) -> list[list[int]]:
        """Return the row numbers of each chunk of `embed`; its arguments, with the tokens of each text."""
        if sub_batch_tokens is None:
            return plan_chunks(lengths, tokens_per_chunk, sub_batch_size)
        multiple = pad_to_multiple_of or SUB_BATCH_MULTIPLE
        return plan_chunks(
            [self._padded(max(1, length), multiple) for length in lengths], sub_batch_tokens, sub_batch_size
        )

    def _run_alone(self, run: Any, *chunk: Any) -> Tensor:
        """Run a chunk of a sub-batch after the memory of the previous one was returned."""
        if chunk[0].device.type == "cpu":
            _return_freed_memory()
        return run(*chunk)

    def pad(
        self,
        token_ids: Sequence[Sequence[int] | np.ndarray],
        rows: Sequence[int],
        multiple: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return input_ids_BT and attention_mask_BT of some rows, padded on the right, on the model's device."""
        width = self._padded(max(1, max(len(token_ids[row]) for row in rows)), multiple)
        # RoBERTa-like models derive positions from the tokens that differ from this id
        pad_id = getattr(self._config, "pad_token_id", None) or 0
        ids_BT = np.full((len(rows), width), pad_id, dtype=np.int64)
        mask_BT = np.zeros((len(rows), width), dtype=np.int64)
        for b, row in enumerate(rows):
            ids_BT[b, : len(token_ids[row])] = token_ids[row]
            mask_BT[b, : len(token_ids[row])] = 1
        device = next(self.parameters()).device
        return send(ids_BT, device), send(mask_BT, device)

    def _padded(self, length: int, multiple: int | None) -> int:
        """Return a length rounded up to a multiple, as far as the model's positions allow it."""
        if not multiple:
            return length
        room = max_positions(self.backbone)
        rounded = -(-length // multiple) * multiple
        return rounded if room is None else max(length, min(rounded, room))

    def pack(
        self, token_ids: Sequence[Sequence[int] | np.ndarray], rows: Sequence[int]
    ) -> tuple[Tensor, Tensor, PackedTexts]:
        """Return input_ids_1T, position_ids_1T and bounds of some rows, concatenated, on the model's device."""
        lengths = tuple(len(token_ids[row]) for row in rows)
        first = first_position(self.backbone)
        ids_T = np.concatenate([np.asarray(token_ids[row], np.int64) for row in rows])
        positions_T = np.concatenate([np.arange(first, first + length) for length in lengths])
        device = next(self.parameters()).device
        bound_E = np.cumsum((0, *lengths), dtype=np.int32)
        return send(ids_T[None], device), send(positions_T[None], device), PackedTexts(lengths, send(bound_E, device))


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to a device; to a GPU from pinned memory, so that the host need not wait for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and afterwards each module back to the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _return_freed_memory() -> None:
    """Return free memory of the C heap to the operating system, if the C library supports it.

    glibc keeps free memory between the small blocks that autograd holds, so the heap would grow with the number of
    sub-batches.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def plan_chunks(lengths: Sequence[int], tokens_per_chunk: int, texts: int | None = None) -> list[list[int]]:
    """Group texts into chunks of similar length.

    The longest come first: a chunk that does not fit into memory fails at once, and later ones reuse its memory.

    Args:
        lengths: tokens of each text.
        tokens_per_chunk: maximal number of tokens in a chunk, with padding; a longer text is alone in its chunk.
        texts: maximal number of texts in a chunk; None: any number.

    Returns:
        Row numbers of each chunk.
    """
    if tokens_per_chunk < 1:
        raise ValueError(f"tokens_per_chunk must be at least 1, found {tokens_per_chunk}")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    chunks: list[list[int]] = []
    start = 0
    while start < len(order):
        size = max(1, tokens_per_chunk // max(1, lengths[order[start]]))
        size = min(size, texts or size)
        chunks.append(order[start : start + size])
        start += size
    return chunks


def gathers_by_layer(model: nn.Module) -> bool:
    """Return True if parts of the model gather their weights when called, so that workers must make equal calls."""
    return any(hasattr(module, "unshard") for module in model.modules())  # as in torch's FSDPModule


def is_causal(backbone: nn.Module) -> bool:
    """Return True if a token attends to earlier ones only, as in a decoder."""
    config = backbone.config
    # decoders converted to bidirectional attention have one of these settings
    if getattr(config, "is_causal", None) is False or getattr(config, "use_bidirectional_attention", None):
        return False
    return any(getattr(module, "is_causal", False) is True for module in backbone.modules())


def position_tables(backbone: nn.Module) -> list[nn.Embedding]:
    """Return the learned tables of absolute positions, under the names of transformers' model families."""
    return [
        module
        for name, module in backbone.named_modules()
        if name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe", "embed_positions")
        and isinstance(module, nn.Embedding)
    ]


def max_positions(backbone: nn.Module) -> int | None:
    """Return the maximal length of a text in tokens, None for no limit.

    Positions of RoBERTa-like models start after the padding id: their table of 514 positions holds 512 tokens.
    """
    for table in position_tables(backbone):
        return table.num_embeddings - (getattr(table, "offset", 0) or first_position(backbone))
    limit = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit is not None and limit > 0 else None


def first_position(backbone: nn.Module) -> int:
    """Return the position of a text's first token: 0, or the padding id plus 1 in RoBERTa-like models."""
    for table in position_tables(backbone):
        return 0 if table.padding_idx is None else table.padding_idx + 1
    return 0
