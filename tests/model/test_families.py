"""Every model family: loaded, run, trained for a step and saved in the layout of sentence-transformers."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny import DECODERS, ENCODERS, KINDS, tokenizer

from raybge.model.embedding import EmbeddingModel, is_causal, max_positions
from raybge.model.encoder import Encoder
from raybge.model.lora import Lora
from raybge.util.errors import UserError

TEXTS = [
    "lane",
    "the text that we read and sort by length in chunks on one node",
    "",
    "rows of one node",
    "block",
    "what is a lane row block of the text that we read and sort by length in chunks on one node " * 2,  # cut at 32
]
POOLINGS = {"cls": "cls", "mean": "mean", "last_token": "lasttoken"}
# positions in a table: its name in each family; the others turn vectors by an angle
TABLES = {
    "bert": "embeddings.position_embeddings",
    "roberta": "embeddings.position_embeddings",
    "distilbert": "embeddings.position_embeddings",
    "mpnet": "embeddings.position_embeddings",
    "gpt2": "wpe",
}


def poolings(kind: str) -> list[str]:
    return [pooling for pooling in POOLINGS if kind in ENCODERS or pooling != "cls"]


def default(kind: str) -> str:
    return "cls" if kind in ENCODERS else "last_token"


def assert_close(result, expected):
    """Equal up to fp32 rounding of unit vectors, which differ between texts."""
    assert np.std(np.asarray(expected), axis=0).max() > 0.05
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def sentence_transformer(folder: str, pooling: str):
    """sentence-transformers on a plain transformers folder."""
    import sentence_transformers as st
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    body = Transformer(folder, max_seq_length=32)
    if body.tokenizer.pad_token is None:
        body.tokenizer.pad_token = body.tokenizer.eos_token  # it refuses to work without one
    parts = [body, Pooling(16, pooling_mode=POOLINGS[pooling]), Normalize()]
    return st.SentenceTransformer(modules=parts, device="cpu")


def plain_transformers(folder: str, pooling: str) -> np.ndarray:
    """Embeddings with transformers alone, one text at a time; zero for a text without tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in TEXTS:
        inputs = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        if not inputs["input_ids"].numel():
            rows.append(torch.zeros(16))
            continue
        with torch.no_grad():
            h_TD = model(input_ids=inputs["input_ids"].long()).last_hidden_state[0]
        e_D = {"cls": h_TD[0], "mean": h_TD.mean(0), "last_token": h_TD[-1]}[pooling]
        rows.append(e_D / e_D.norm())
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("kind, pooling", [(kind, pooling) for kind in KINDS for pooling in poolings(kind)])
def test_equals_sentence_transformers_on_the_same_folder(tiny, kind, pooling):
    folder = tiny(kind)
    encoder = Encoder(folder, pooling_method=pooling, devices="cpu")
    peer = sentence_transformer(folder, pooling)
    expected = peer.encode(TEXTS)
    assert_close(encoder.encode(TEXTS), expected)
    assert_close(encoder.encode(TEXTS, batch_size=1, max_length=32), expected)  # less padding
    assert_close(expected, plain_transformers(folder, pooling))


def train_a_step(encoder: Encoder) -> list[str]:
    """Train one step; return the trainable parameters without a gradient."""
    torch.manual_seed(1)
    model = encoder.model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    e_ND = model.embed(encoder.tokenize(TEXTS, 32), 100)
    (e_ND @ e_ND.T).tril(-1).pow(2).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained.values())  # a text without a token too
    # the key's bias adds the same to all scores of a query: its gradient is zero but for rounding
    still = [n for n, p in trained.items() if p.grad is None or (p.grad.norm() == 0 and "bias" not in n)]
    torch.optim.AdamW(trained.values(), lr=0.01).step()
    model.eval()
    return still


@pytest.mark.parametrize("kind", KINDS)
def test_trained_model_loads_in_other_libraries(tiny, tmp_path, kind):
    """Data-parallel training waits for the gradient of every trainable parameter, so a pooler is frozen."""
    folder = tiny(kind)
    encoder = Encoder(folder, devices="cpu")
    before = encoder.encode(TEXTS)
    assert train_a_step(encoder) == []
    trained = encoder.encode(TEXTS)
    assert np.abs(trained - before).max() > 0.01
    saved = str(tmp_path / "saved")
    encoder.save(saved)
    import sentence_transformers as st

    peer = st.SentenceTransformer(saved, device="cpu")
    assert_close(peer.encode(TEXTS), trained)
    assert_close(plain_transformers(saved, default(kind)), trained)
    again = Encoder(saved, devices="cpu")
    assert_close(again.encode(TEXTS), trained)
    again.save(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == Path(saved, name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_maximal_lengths(tiny, kind):
    encoder = Encoder(tiny(kind), devices="cpu")
    assert (encoder.dim, max_positions(encoder.model.backbone), encoder.query_max_length) == (16, 32, 32)
    # the longest text runs; one token more than a table holds does not
    encoder.model.embed([[5] * 32], 100)
    if kind in TABLES:
        with pytest.raises((IndexError, RuntimeError)):
            encoder.model.embed([[5] * 33], 100)


def test_position_table_with_an_offset():
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    model = EmbeddingModel(transformers.OPTModel(config), "last_token")
    assert model.backbone.decoder.embed_positions.num_embeddings == 34
    assert max_positions(model.backbone) == 32
    model.embed([[5] * 32], 100)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_can_be_frozen(tiny, kind):
    model = Encoder(tiny(kind), devices="cpu").model
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    if kind not in TABLES:
        with pytest.raises(UserError, match="--fix_position_embedding: this model has no table"):
            model.freeze_positions()
        return
    model.freeze_positions()
    after = {name for name, p in model.named_parameters() if p.requires_grad}
    assert before - after == {f"backbone.{TABLES[kind]}.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_language_model_folder_loads_its_backbone(tiny, kind):
    folder = tiny(kind, head=True)
    auto = transformers.AutoModelForCausalLM if kind in DECODERS else transformers.AutoModelForMaskedLM
    whole = auto.from_pretrained(folder).eval()
    assert type(whole.base_model) is not type(whole)
    encoder = Encoder(folder, devices="cpu")
    ids = encoder.tokenize(TEXTS[:2], 32)
    assert encoder.model.pooling == default(kind)
    for text in ids:
        with torch.no_grad():
            h_TD = whole.base_model(input_ids=torch.tensor([text])).last_hidden_state[0]
            e_D = encoder.model.embed([text], 100)[0]
        expected_D = h_TD[0] if kind in ENCODERS else h_TD[-1]
        torch.testing.assert_close(e_D, expected_D / expected_D.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_decoders_are_causal_and_reject_cls_pooling(tiny, kind):
    backbone = transformers.AutoModel.from_pretrained(tiny(kind))
    assert is_causal(backbone) == (kind in DECODERS)
    if kind in DECODERS:
        with pytest.raises(UserError, match=r"pooling 'cls': this model is a decoder.*expected last_token or mean"):
            EmbeddingModel(backbone, "cls")


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_has_no_cache(tiny, kind):
    backbone = Encoder(tiny(kind), devices="cpu").model.backbone
    assert backbone(input_ids=torch.tensor([[5, 6]])).past_key_values is None


@pytest.mark.parametrize("kind", DECODERS)
def test_saved_tokenizer_is_unchanged_and_can_pad(tiny, tmp_path, kind):
    folder = tiny(kind)
    before = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(folder, devices="cpu")
    encoder.save(tmp_path / "saved")
    after = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert after.padding_side == before.padding_side == ("left" if kind == "qwen3" else "right")
    assert after.pad_token == (before.pad_token or before.eos_token)
    assert [after(text)["input_ids"] for text in TEXTS] == [before(text)["input_ids"] for text in TEXTS]
    # the model's own word stays: with a padding id its row of the table would never be trained
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config.get("pad_token_id") == json.loads(Path(folder, "config.json").read_text()).get("pad_token_id")


@pytest.mark.parametrize("lora", [None, {"rank": 4, "dropout": 0.0}])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_decoder_loads_in_flag_embedding(tiny, tmp_path_factory, kind, lora):
    peers = pytest.importorskip("FlagEmbedding", reason="FlagEmbedding is not installed", exc_type=ImportError)
    tmp_path = tmp_path_factory.mktemp("saved")
    adapters = Lora(**lora) if lora else None
    encoder = Encoder(tiny(kind), query_instruction_for_retrieval="what is ", lora=adapters, devices="cpu")
    train_a_step(encoder)
    encoder.save(tmp_path)
    peer = peers.FlagLLMModel(
        str(tmp_path),
        query_instruction_for_retrieval="what is ",
        query_instruction_format="{}{}",
        use_fp16=False,
        devices="cpu",
        query_max_length=32,
        passage_max_length=32,
    )
    texts = [text for text in TEXTS if text]
    assert_close(peer.encode_corpus(texts), encoder.encode_corpus(texts))
    assert_close(peer.encode_queries(texts), encoder.encode_queries(texts))


def test_another_configuration_and_tokenizer_are_used(tiny, tmp_path):
    folder, other = tiny("bert", "one"), tiny("bert", "two", num_hidden_layers=1)
    os.remove(f"{other}/model.safetensors")
    shallow = Encoder(folder, config_name=other, devices="cpu")
    deep = Encoder(folder, devices="cpu")
    assert len(shallow.model.backbone.encoder.layer) == 1 and len(deep.model.backbone.encoder.layer) == 2
    layers = deep.model.backbone.encoder.layer
    deep.model.backbone.encoder.layer = layers[:1]
    assert_close(shallow.encode(TEXTS), deep.encode(TEXTS))
    words = json.loads(Path(folder, "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["lane"], vocab["row"] = vocab["row"], vocab["lane"]
    shutil.copytree(folder, tmp_path / "swapped")
    (tmp_path / "swapped" / "tokenizer.json").write_text(json.dumps(words))
    swapped = Encoder(folder, tokenizer_name=str(tmp_path / "swapped"), devices="cpu")
    plain = Encoder(folder, devices="cpu")
    np.testing.assert_array_equal(swapped.encode("lane of row"), plain.encode("row of lane"))
    assert np.abs(swapped.encode("lane of row") - plain.encode("lane of row")).max() > 0.01


def test_other_kinds_of_models_are_errors(tmp_path, tiny):
    folder = tiny("bert", "wide")
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(UserError, match=r"wide: weights do not have the shapes.*is \(32,\) in the file and \(48,\)"):
        Encoder(folder, devices="cpu")
    both = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5Model(both).save_pretrained(tmp_path / "t5")
    tokenizer("bert").save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="is an encoder-decoder model"):
        Encoder(str(tmp_path / "t5"), devices="cpu")
