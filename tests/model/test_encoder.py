"""Encoder against other libraries on the same model, and saved folders that they load."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers

from raybge.data.prompts import Instructions
from raybge.model.encoder import Encoder
from raybge.util.errors import UserError

TEXTS = [
    "what is a lane?",
    "Passages of very different length, so that sorting and padding have something to do. " * 12,
    "",
    "a block",
    "The largest divisor of the global batch, " * 60,  # above 256 tokens: cut
]
TOLERANCE = 1e-5  # fp32 with unit vectors; the other side pads and batches in its own way


@pytest.fixture(scope="module")
def encoder(minilm: str) -> Encoder:
    return Encoder(minilm, devices="cpu")


@pytest.fixture
def st():
    """sentence-transformers, fp32 on the CPU."""
    import sentence_transformers as library

    return lambda folder, **more: library.SentenceTransformer(str(folder), device="cpu", **more)


def assert_close(result, expected):
    """Equal embeddings, which differ between texts."""
    assert np.std(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(result, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("length", [None, 8, 64, 512])
def test_equals_sentence_transformers(minilm, st, length):
    encoder = Encoder(minilm, devices="cpu", query_max_length=length, passage_max_length=length)
    peer = st(minilm)
    peer.max_seq_length = length or peer.max_seq_length
    assert_close(encoder.encode(TEXTS), peer.encode(TEXTS))


def test_prompts_equal_those_of_sentence_transformers(minilm, st, tmp_path):
    prompts = {"query": "ask: ", "document": "say: ", "topic": "about: "}
    peer = st(minilm, prompts=prompts, default_prompt_name="topic")
    peer.save(str(tmp_path))
    encoder = Encoder(str(tmp_path), devices="cpu")
    assert_close(encoder.encode_queries(TEXTS), peer.encode_query(TEXTS))
    assert_close(encoder.encode_corpus(TEXTS), peer.encode_document(TEXTS))
    assert_close(encoder.encode(TEXTS), peer.encode(TEXTS))
    assert not np.allclose(encoder.encode(TEXTS), encoder.encode_queries(TEXTS), atol=1e-3)


def test_prompt_for_passages_alone_equals_sentence_transformers(minilm, st, tmp_path):
    # version 6 takes the empty "document" before "passage"
    peer = st(minilm, prompts={"passage": "say: "})
    peer.save(str(tmp_path))
    assert_close(Encoder(str(tmp_path), devices="cpu").encode_corpus(TEXTS), peer.encode_document(TEXTS))


def test_folder_with_lower_case(tiny, st, tmp_path):
    folder = tiny()
    (tmp_path / "tiny" / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])
            ]
        )
    )
    (tmp_path / "tiny" / "1_Pooling").mkdir()
    config = {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
    }
    (tmp_path / "tiny" / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (tmp_path / "tiny" / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    encoder = Encoder(folder, devices="cpu")
    assert_close(encoder.encode(["WHAT is A Lane", "row"]), encoder.encode(["what is a lane", "row"]))
    assert_close(encoder.encode(["WHAT is A Lane", "row"]), st(folder).encode(["WHAT is A Lane", "row"]))
    encoder.save(tmp_path / "saved")
    again = Encoder(str(tmp_path / "saved"), devices="cpu")
    assert_close(again.encode(["WHAT", "row"]), encoder.encode(["what", "row"]))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
@pytest.mark.parametrize("normalize", [True, False])
def test_saved_folders_load_in_other_libraries_with_equal_embeddings(tiny, st, tmp_path, kind, pooling, normalize):
    saved = Encoder(
        tiny(kind),
        normalize,
        query_instruction_for_retrieval="what is",
        query_instruction_format="{} : {}",
        passage_instruction_for_retrieval="a row ",
        pooling_method=pooling,
        query_max_length=6,
        passage_max_length=9,
        devices="cpu",
    )
    texts = ["lane", "the text that we read and sort by length in chunks", "rows of one node", "block"]
    saved.encode(texts)  # whatever the tokenizer did last must not be in the folder
    saved.save(tmp_path / "saved")
    again = Encoder(str(tmp_path / "saved"), devices="cpu")
    peer = st(tmp_path / "saved")
    assert again.settings.source == "modules.json"
    assert again.query_max_length == again.passage_max_length == peer.max_seq_length == 9
    assert_close(again.encode_queries(texts, max_length=6), saved.encode_queries(texts))
    assert_close(again.encode_corpus(texts), saved.encode_corpus(texts))
    assert_close(peer.encode_document(texts), saved.encode_corpus(texts))
    assert_close(peer.encode_query(texts), saved.encode_queries(texts, max_length=9))
    assert_close(plain_transformers(tmp_path / "saved", pooling, normalize, texts), saved.encode(texts))
    assert peer.similarity_fn_name == ("cosine" if normalize else "dot")


def plain_transformers(folder, pooling, normalize, texts):
    """Embeddings with transformers alone; the tokenizer limits the length."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, return_tensors="pt")
        with torch.no_grad():
            h_TD = model(**inputs).last_hidden_state[0]
        e_D = {"cls": h_TD[0], "mean": h_TD.mean(0), "last_token": h_TD[-1]}[pooling]
        rows.append(e_D / e_D.norm() if normalize else e_D)
    return torch.stack(rows).numpy()


def test_saved_folder_loads_in_flag_embedding(encoder, tmp_path):
    peers = pytest.importorskip(
        "FlagEmbedding",
        reason="FlagEmbedding is not installed (pip install --no-deps FlagEmbedding==1.4.2 peft)",
        exc_type=ImportError,
    )
    encoder = copy.copy(encoder)
    encoder.instructions = Instructions("ask: ")
    encoder.save(tmp_path)
    peer = peers.FlagModel(
        str(tmp_path),
        pooling_method="mean",
        query_instruction_for_retrieval="ask: ",
        use_fp16=False,
        devices="cpu",
        query_max_length=256,
        passage_max_length=256,
    )
    assert_close(peer.encode_queries(TEXTS), encoder.encode_queries(TEXTS))
    assert_close(peer.encode_corpus(TEXTS), encoder.encode_corpus(TEXTS))


def test_saving_is_deterministic(tiny, tmp_path):
    # without the pooler in the file transformers makes one of random numbers
    encoder = Encoder(tiny(pooler=False), devices="cpu")
    encoder.save(tmp_path / "a")
    encoder.encode(["what is a lane"], max_length=5)
    again = Encoder(str(tmp_path / "a"), devices="cpu")
    again.save(tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) >= 7
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_input_types_of_flag_model(encoder):
    assert encoder.encode(TEXTS).shape == (5, encoder.dim) == (5, 384)
    assert encoder.encode(TEXTS).dtype == np.float32
    assert encoder.encode(TEXTS[0]).shape == (384,)
    assert encoder.encode([]).shape == (0, 384)
    tensor = encoder.encode_corpus(TEXTS, convert_to_numpy=False)
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and not tensor.requires_grad
    for batch_size in (1, 3):
        assert_close(encoder.encode_corpus(TEXTS, batch_size=batch_size), tensor.numpy())
    assert_close(encoder.encode(TEXTS, max_length=8), encoder.encode_queries(TEXTS, 2, 8))


def test_batch_size_limits_chunks(encoder):
    sizes = []
    hook = encoder.model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    encoder.encode(["a b c d e f"] * 6, batch_size=1, max_length=16)  # 8 tokens each: two of them are 16
    encoder.encode(["a b c d e f"] * 6, max_length=16)
    hook.remove()
    assert sizes == [(2, 8)] * 3 + [(6, 8)]


def test_length_is_limited_by_the_model(tiny):
    encoder = Encoder(tiny("roberta"), devices="cpu", query_max_length=500)
    assert encoder.query_max_length == encoder.passage_max_length == 32
    assert encoder.encode(["row " * 100] * 2, max_length=100).shape == (2, 16)
    with pytest.raises(UserError, match="at least 1 token, found 0"):
        encoder.encode(["row"], max_length=0)


def test_settings_without_sentence_transformers_files(tiny):
    encoder = Encoder(tiny(), devices="cpu")
    assert (encoder.settings.source, encoder.model.pooling, encoder.model.normalize) == (
        "default",
        "cls",
        True,
    )
    other = Encoder(tiny(), False, pooling_method="mean", devices="cpu")
    assert (other.model.pooling, other.model.normalize) == ("mean", False)


def test_arguments_override_the_folder(minilm):
    encoder = Encoder(minilm, False, pooling_method="cls", query_max_length=300, devices="cpu")
    assert (encoder.model.pooling, encoder.model.normalize) == ("cls", False)
    assert (encoder.query_max_length, encoder.passage_max_length) == (300, 256)


def test_half_precision_is_off_on_a_cpu(tiny):
    encoder = Encoder(tiny(), use_fp16=True, devices="cpu")
    assert next(encoder.model.parameters()).dtype == torch.float32


def test_prompt_of_a_row_replaces_the_instruction(minilm):
    encoder = Encoder(minilm, query_instruction_for_retrieval="Find: ", devices="cpu")
    assert encoder.query_text("q") == "Find: q"
    assert encoder.query_text("q", prompt="Sort: ") == "Sort: q"
    assert encoder.passage_text("p") == "p"


def test_encoding_has_no_dropout_and_restores_training_mode(tiny):
    encoder = Encoder(tiny(), devices="cpu")
    still = encoder.encode(["what is a lane", "row"])
    encoder.model.train()
    assert_close(encoder.encode(["what is a lane", "row"]), still)
    assert encoder.model.training and encoder.model.backbone.training


def test_missing_models_are_errors(tiny, tmp_path):
    folder = tiny()
    with pytest.raises(UserError, match="devices: expected one or more"):
        Encoder(folder, devices=[])
    with pytest.raises(UserError, match="the model raybge/no-such-model does not load"):
        Encoder("raybge/no-such-model", devices="cpu")
    with pytest.raises(UserError, match=r"--tokenizer_name .*nowhere: no such folder"):
        Encoder(folder, tokenizer_name=str(tmp_path / "nowhere"), devices="cpu")
    os.remove(f"{folder}/model.safetensors")
    with pytest.raises(UserError, match="no weights here"):
        Encoder(folder, devices="cpu")


def test_weights_of_other_shapes_are_errors(tiny, tmp_path):
    bert, roberta = tiny("bert", "one"), tiny("roberta", "two")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks weights: encoder\.layer\.2\..* \(16 in total\)"):
        Encoder(bert, devices="cpu")
    shutil.copy(f"{bert}/model.safetensors", roberta)
    with pytest.raises(UserError, match="weights do not have the shapes of its config.json"):
        Encoder(roberta, devices="cpu")
    (tmp_path / "two" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"two/model\.safetensors is damaged or cut off"):
        Encoder(roberta, devices="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_half_precision_on_a_gpu(minilm, encoder):
    half = Encoder(minilm)
    assert half.device.type == "cuda" and next(half.model.parameters()).dtype == torch.float16
    # fp16 has 11 bits: unit vectors agree to about 1e-3
    np.testing.assert_allclose(half.encode(TEXTS), encoder.encode(TEXTS), atol=3e-3)
    np.testing.assert_allclose(Encoder(minilm, use_fp16=False).encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)


def test_repr_names_model_and_settings(minilm):
    encoder = Encoder(minilm, devices="cpu", query_max_length=32, truncate_dim=64, normalize_embeddings=False)
    assert repr(encoder) == (
        f"Encoder({minilm!r}, pooling='mean', normalize=False, dim=64, query_max_length=32, passage_max_length=256, "
        "dtype=torch.float32, devices=['cpu'])"
    )
