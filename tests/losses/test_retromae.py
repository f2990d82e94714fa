"""RetroMAE's loss and gradient against plain loops that follow the definition, one text and one position at a time."""

import os
from dataclasses import replace

import pytest
import torch
import transformers
from process_runtime import run_in_processes
from tiny import ENCODERS, WORDS, make_tiny
from torch.nn.functional import gelu

from raybge.data.jsonl import Row
from raybge.data.masking import MaskedBatch, TextMasker, unpack_masked
from raybge.losses import retromae
from raybge.losses.enhanced_decoder import EnhancedDecoder, visible_context
from raybge.losses.retromae import RetroMAE
from raybge.util.errors import UserError

# a language model's head on hidden states
HEADS = {
    "bert": lambda lm, h: lm.cls(h),
    "roberta": lambda lm, h: lm.lm_head(h),
    "distilbert": lambda lm, h: lm.vocab_projector(lm.vocab_layer_norm(gelu(lm.vocab_transform(h)))),
    "mpnet": lambda lm, h: lm.lm_head(h),
    "modernbert": lambda lm, h: lm.decoder(lm.head(h)),
    "nomic_bert": lambda lm, h: lm.cls(h),
}
FIRST = {"roberta": 2, "mpnet": 2}  # number of the first position in the table
TEXTS = [
    "lane",
    "what is a lanes rows block of the text",
    "the text that we read and sort by length in chunks on one node",
    "rows of one node",
    "block",
    "what is a lane row block of the text that we read and sort by length in chunks on one node " * 2,  # cut at 32
    "? . , !",
    "nodes in lanes of texts",
]
SHARES = [(5, 3), (0, 8)]  # texts of each of two workers
METHODS = ("retromae", "dupmae")


def batch_of(tokenizer, texts=TEXTS, first=0, length=32) -> MaskedBatch:
    rows = [Row(0, first + i, i + 1, {}, text) for i, text in enumerate(texts)]
    return unpack_masked(TextMasker(tokenizer, length, seed=4)(0, 0, rows))


def opened(folder):
    return transformers.AutoModelForMaskedLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def without_dropout(model):
    """In training mode without dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family, with a head and a tokenizer that has a mask token."""
    root = tmp_path_factory.mktemp("families")
    return {kind: make_tiny(root / kind, kind, head=True, mask=True, dropout=0.0) for kind in ENCODERS}


def model_of(folder, method="retromae") -> RetroMAE:
    lm, _ = opened(folder)
    torch.manual_seed(5)
    return without_dropout(RetroMAE(lm, method))


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


# --- the definition ---------------------------------------------------------------------------------------------------


def normal(x, layer):
    return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + layer.eps) * layer.weight + layer.bias


def linear(x, layer):
    return layer.weight @ x + layer.bias


def decoded(decoder: EnhancedDecoder, cls, tokens, positions, visible, i):
    """The decoder's output at position i, one head and one context token at a time."""
    query = cls + positions[i]
    context = [cls if j == 0 else tokens[j] for j in range(len(tokens)) if visible[i][j]]
    width = len(cls) // decoder.heads
    heads = []
    for head in range(decoder.heads):
        part = slice(head * width, (head + 1) * width)
        q = linear(query, decoder.query)[part]
        scores = torch.stack([torch.dot(q, linear(c, decoder.key)[part]) / width**0.5 for c in context])
        weights = torch.exp(scores) / torch.exp(scores).sum()
        values = [w * linear(c, decoder.value)[part] for w, c in zip(weights, context, strict=True)]
        heads.append(torch.stack(values).sum(0))
    h = normal(query + linear(torch.cat(heads), decoder.out), decoder.middle_norm)
    inner = linear(h, decoder.widen)
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return normal(h + linear(inner, decoder.narrow), decoder.norm)


def sees(text, i, j):
    """Position i attends to the CLS vector and to each token of its subset except itself."""
    bits = "".join(f"{byte:08b}" for byte in text.visible_RS[text.pick_T[i]])
    return j == 0 or (i != j and bits[j] == "1")


def by_definition(kind, folder, decoder, batch):
    """The three parts, each the mean over its predicted tokens or texts."""
    lm, _ = opened(folder)
    lm.eval()

    def cross_entropy(logits, word):
        return torch.logsumexp(logits, 0) - logits[word]

    encoder, decoder_losses, bows = [], [], []
    for text in batch.texts:
        ids = torch.from_numpy(text.token_T).long()
        h = lm.base_model(input_ids=torch.from_numpy(text.shown_T).long()[None]).last_hidden_state[0]
        logits = HEADS[kind](lm, h)
        length = len(ids)
        encoder += [cross_entropy(logits[i], ids[i]) for i in range(length) if text.masked_T[i]]
        tokens = lm.base_model.embeddings(input_ids=ids[None])[0]
        if decoder.positions is None:
            first = FIRST.get(kind, 0)
            positions = lm.base_model.embeddings.position_embeddings.weight[first : first + length]
        else:
            positions = decoder.positions.weight[:length]
            tokens = tokens + positions
        visible = [[sees(text, i, j) for j in range(length)] for i in range(length)]
        ordinary = range(1, length - 1)  # all but what begins and ends a text
        for i in ordinary:
            created = decoded(decoder, h[0], tokens, positions, visible, i)
            decoder_losses.append(cross_entropy(HEADS[kind](lm, created[None])[0], ids[i]))
        # positions that tie share the gradient: the padding's row of the head is 0, and all tie in it
        most = torch.stack([logits[i] for i in ordinary]).amax(0)
        bows.append(sum(cross_entropy(most, word) for word in {int(ids[i]) for i in ordinary}) / len(ordinary))
    return [torch.stack(losses).mean() for losses in (encoder, decoder_losses, bows)], lm


@pytest.mark.parametrize("kind", ENCODERS)
def test_loss_parts_equal_the_definition(folders, kind):
    """In every model family; tolerance 1e-5: fp32 sums in another order."""
    model = model_of(folders[kind], "dupmae")
    assert (model.decoder.positions is not None) == (kind in ("modernbert", "nomic_bert"))
    batch = batch_of(opened(folders[kind])[1])
    assert len({text.masked_T.sum() for text in batch.texts}) > 3
    (encoder, decoder, bow), _ = by_definition(kind, folders[kind], model.decoder, batch)
    parts = model.loss_parts(batch)
    assert parts.encoder.item() == pytest.approx(encoder.item(), rel=1e-5)
    assert parts.decoder.item() == pytest.approx(decoder.item(), rel=1e-5)
    assert parts.bow.item() == pytest.approx(bow.item(), rel=1e-5)
    assert model(batch).item() == pytest.approx((encoder + decoder + 0.1 * bow).item(), rel=1e-5)


def test_gradient_equals_the_definition(folders):
    """For the weights of the encoder, among them those shared with the head, and of the decoder."""
    model = model_of(folders["bert"], "dupmae")
    batch = batch_of(opened(folders["bert"])[1])
    model(batch).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (encoder, decoder, bow), lm = by_definition("bert", folders["bert"], model.decoder, batch)
    (encoder + decoder + 0.1 * bow).backward()
    expected = {name.replace("bert.", "embedding.backbone.", 1): p.grad for name, p in lm.named_parameters()}
    expected = {name if name in gradients else f"head.{name}": grad for name, grad in expected.items()}
    expected |= {f"decoder.{name}": p.grad for name, p in model.decoder.named_parameters()}
    assert gradients.keys() == expected.keys()
    scale = max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        assert (gradients[name] - grad).norm() < 1e-5 * scale, name
        assert grad.norm() > 0 or "bias" in name, name


# --- W processes ------------------------------------------------------------------------------------------------------


def one_worker(rank: int, world: int, model_folder: str, folder: str) -> None:
    """Run every method and share with DistributedDataParallel as in training; rank 0 saves loss and gradient."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    _, tokenizer = opened(model_folder)
    outcome = {}
    for method in METHODS:
        for shares in SHARES:
            model = torch.nn.parallel.DistributedDataParallel(model_of(model_folder, method))
            first = sum(shares[:rank])
            loss = model(batch_of(tokenizer, TEXTS[first : first + shares[rank]], first))
            loss.backward()
            mean = loss.detach() / world
            torch.distributed.all_reduce(mean)
            outcome[method, shares] = mean.item(), gradient_of(model)
    if rank == 0:
        torch.save(outcome, os.path.join(folder, "outcome"))
    torch.distributed.barrier()
    os._exit(0)  # destroying the process group while a DDP model is alive can block forever


@pytest.fixture(scope="module")
def outcomes(folders, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("workers"))
    run_in_processes(one_worker, (2, folders["bert"], folder), 2)
    return torch.load(os.path.join(folder, "outcome"), weights_only=False)


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_workers_have_the_gradient_of_one_process(folders, outcomes, method, shares):
    """Also if one of them has no text. A factor 1/W or W would be off by 0.5 or 1."""
    model = model_of(folders["bert"], method)
    expected = model(batch_of(opened(folders["bert"])[1]))
    expected.backward()
    loss, gradient = outcomes[method, shares]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert gradient_of(model).norm() > 1e-2
    assert (gradient - gradient_of(model)).norm() / gradient.norm() < 1e-5


def test_empty_batch_has_zero_gradients(folders):
    model = model_of(folders["bert"], "dupmae")
    loss = model(batch_of(opened(folders["bert"])[1], []))
    loss.backward()
    assert loss.item() == 0
    assert not gradient_of(model).any()


# --- the decoder ------------------------------------------------------------------------------------------------------


def test_position_attends_to_cls_and_its_subset_and_never_to_itself(folders):
    batch = batch_of(opened(folders["bert"])[1])
    width = max(len(text.token_T) for text in batch.texts) + 3
    visible_BTT = visible_context(batch.texts, width, torch.device("cpu"))
    for b, text in enumerate(batch.texts):
        for i in range(len(text.token_T)):
            expected = [sees(text, i, j) if j < len(text.token_T) else False for j in range(width)]
            assert visible_BTT[b, i].tolist() == expected
    assert 0.3 < visible_BTT[5].float().mean() < 0.6


def test_decoder_depends_on_visible_context_alone():
    """Changes one context vector at a time and compares the output at each position."""
    torch.manual_seed(2)
    config = transformers.BertConfig(hidden_size=16, num_attention_heads=2, initializer_range=0.5)
    decoder = without_dropout(EnhancedDecoder(config))
    cls_BD, token_BTD, position_TD = torch.randn(1, 16), torch.randn(1, 6, 16), torch.randn(6, 16)
    visible_BTT = torch.rand(1, 6, 6) < 0.5
    visible_BTT[:, range(6), range(6)] = False
    visible_BTT[:, :, 0] = True
    before = decoder(cls_BD, token_BTD, position_TD, visible_BTT)
    for j in range(6):
        changed = token_BTD.clone()
        changed[0, j] += 1
        differs_T = (decoder(cls_BD, changed, position_TD, visible_BTT) != before)[0].any(dim=-1)
        # the first token's embedding has no place: the CLS vector stands there
        assert differs_T.tolist() == (visible_BTT[0, :, j].tolist() if j else [False] * 6)
    assert (decoder(cls_BD + 0.1, token_BTD, position_TD, visible_BTT) - before).abs().amax(-1).min() > 1e-3
    for i in range(6):
        moved = position_TD.clone()
        moved[i] += 1
        differs_T = (decoder(cls_BD, token_BTD, moved, visible_BTT) != before)[0].any(dim=-1)
        assert differs_T.tolist() == [t == i for t in range(6)]


@pytest.mark.parametrize("kind", ENCODERS)
def test_decoder_gradient_reaches_the_encoder_through_the_cls_vector_alone(folders, kind):
    model = model_of(folders[kind])
    hidden_states = []

    def keep(module, args, out):
        out.last_hidden_state.retain_grad()
        hidden_states.append(out.last_hidden_state)

    model.embedding.backbone.register_forward_hook(keep)
    model.loss_parts(batch_of(opened(folders[kind])[1])).decoder.backward()
    for h_BTD in hidden_states:
        assert h_BTD.grad[:, 0].norm(dim=-1).min() > 1e-6
        assert not h_BTD.grad[:, 1:].any()


# --- ways to compute the same -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_chunks_and_blocks_have_no_effect_on_the_loss(folders, monkeypatch, method):
    batch = batch_of(opened(folders["bert"])[1])
    whole = model_of(folders["bert"], method)
    whole(batch).backward()
    monkeypatch.setattr(retromae, "CPU_TOKENS_PER_CHUNK", 40)
    monkeypatch.setattr(retromae, "LOGITS_PER_BLOCK", 64 * 7)  # 7 tokens
    parts = model_of(folders["bert"], method)
    parts.pad_to_multiple_of = 8
    loss = parts(batch)
    loss.backward()
    with torch.no_grad():
        assert parts(batch).item() == pytest.approx(loss.item(), rel=1e-6)
    assert (gradient_of(parts) - gradient_of(whole)).norm() / gradient_of(whole).norm() < 1e-5


def test_half_precision_gradient_is_close(folders, monkeypatch):
    """The cache of autocast serves the blocks of the head; it would add the encoder's gradients of chunks in bf16."""
    monkeypatch.setattr(retromae, "LOGITS_PER_BLOCK", 64 * 7)
    batch, caches = batch_of(opened(folders["bert"])[1]), []
    whole, half = (model_of(folders["bert"], "dupmae") for _ in range(2))
    whole(batch).backward()
    half.embedding.backbone.register_forward_hook(lambda *_: caches.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = half(batch)
    loss.backward()
    exact, rounded = gradient_of(whole), gradient_of(half)
    assert (rounded - exact).norm() / exact.norm() < 0.3 and set(caches) == {False}
    assert all(parameter.grad.norm() > 0 for parameter in half.head.parameters())


@pytest.mark.parametrize("kind", ENCODERS)
def test_fast_attention_changes_dropout_alone(folders, kind):
    batch = batch_of(opened(folders[kind])[1])
    plain, fast = model_of(folders[kind]), model_of(folders[kind])
    fast.prepare_for_training()
    without_dropout(fast)
    assert fast(batch).item() == pytest.approx(plain(batch).item(), rel=1e-5)


def test_dropout_is_active_in_encoder_and_decoder(folders):
    batch = batch_of(opened(folders["bert"])[1])
    model = model_of(folders["bert"])
    exact = model.loss_parts(batch)
    for module, part, other in ((model.decoder, "decoder", "encoder"), (model.embedding, "encoder", None)):
        for each in module.modules():
            if isinstance(each, torch.nn.Dropout):
                each.p = 0.3
        dropped = model.loss_parts(batch)
        assert getattr(dropped, part).item() != pytest.approx(getattr(exact, part).item(), rel=1e-3)
        if other:
            assert getattr(dropped, other).item() == pytest.approx(getattr(exact, other).item(), rel=1e-6)
        without_dropout(model)
    model.decoder.attention_dropout = 0.3
    assert model.loss_parts(batch).decoder.item() != pytest.approx(exact.decoder.item(), rel=1e-3)


def test_loss_falls_in_training(folders):
    """On a few repeated texts both parts fall by half."""
    lm, tokenizer = opened(folders["bert"])
    model = RetroMAE(lm)
    batch = batch_of(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = model.loss_parts(batch)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    after = model.loss_parts(batch)
    assert after.encoder < before.encoder / 2 and after.decoder < before.decoder / 2


# --- texts and models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["lane", "nodes", "... ?!", "我们把文本分成块", "\u200b", "a row of " * 40_000])
@pytest.mark.parametrize("method", METHODS)
def test_short_texts_have_a_finite_loss(folders, method, text):
    """Alone in a step and with another text, whose loss does not change."""
    _, tokenizer = opened(folders["bert"])
    model = model_of(folders["bert"], method)
    alone = model(batch_of(tokenizer, [text]))
    alone.backward()
    assert alone.isfinite() and gradient_of(model).isfinite().all()
    one, other, both = (batch_of(tokenizer, texts) for texts in ([text], TEXTS[2:3], [text, TEXTS[2]]))
    both = replace(both, texts=[one.texts[0], other.texts[0]])
    counts = [len(batch.texts[0].token_T[batch.texts[0].ordinary_T]) for batch in (one, other)]
    with torch.no_grad():
        losses = [float(model.loss_parts(batch).decoder) for batch in (one, other, both)]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=False)) / sum(counts)
    assert losses[2] == pytest.approx(mean, rel=1e-5)


def test_unsupported_models_and_methods_are_errors(folders):
    lm, _ = opened(folders["bert"])
    with pytest.raises(UserError, match="--pretrain_method mae: expected one of retromae, dupmae"):
        RetroMAE(lm, "mae")
    config = transformers.AlbertConfig(vocab_size=64, embedding_size=8, hidden_size=16, num_attention_heads=2)
    with pytest.raises(UserError, match="width of the vectors, which AlbertModel does not provide"):
        RetroMAE(transformers.AlbertForMaskedLM(config))


def test_words_of_the_tiny_models_have_several_tokens(folders):
    """Canary: otherwise no test above would mask a whole word."""
    _, tokenizer = opened(folders["bert"])
    [(_, word_T)] = TextMasker(tokenizer, 32, 0).tokenize(["lanes"])
    assert word_T.tolist() == [-1, 0, 0, -1] and "##s" in WORDS
