"""Scores of pairs against other libraries on the same model, and models that are no reranker."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tiny import SENTENCE, configure_tokenizer, make_classifier, tokenizer, write_placeholders

from raybge.model import reranker as module
from raybge.model.reranker import Reranker, check_reranker
from raybge.util.errors import UserError

KINDS = ("bert", "roberta", "distilbert", "modernbert", "qwen3", "llama", "gpt2")
PAIRS = [
    ("what is a lane", "lane"),
    ("lane", "the text that we read and sort by length in chunks on one node"),
    ("rows of one node", "block"),
    ("a block", ""),
    ("", "row"),
    ("read on", "length " * 40),  # above 32 tokens: the passage is cut
    ("lane", "the text that we read and sort"),
    ("sort it", "a row [SEP]"),  # ends as padded texts do, where the end token pads
    ("sort it", "a block [PAD]"),
]


@pytest.fixture
def classifier(tmp_path):
    return lambda *args, **more: make_classifier(tmp_path / "classifier", *args, **more)


def logit(folder: str, ids: list[int], types: list[int] | None = None) -> float:
    """The plain model's score of one unpadded pair."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = {"input_ids": torch.tensor([ids])}
    if model.config.model_type == "bert":
        inputs["token_type_ids"] = torch.tensor([types])
    with torch.no_grad():
        return float(model(**inputs).logits[0, 0])


def one_by_one(folder: str, pairs, max_length: int = 32) -> list[float]:
    known = transformers.AutoTokenizer.from_pretrained(folder)
    scores = []
    for query, passage in pairs:
        # as lists: an empty passage that is no list counts as none
        rows = known([query], [passage], truncation="only_second", max_length=max_length)
        scores.append(logit(folder, rows["input_ids"][0], rows.get("token_type_ids", [None])[0]))
    return scores


def assert_close(result, expected):
    """Equal up to fp32 rounding, and different between pairs."""
    assert np.std(expected) > 0.05
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_those_of_single_pairs(classifier, kind):
    folder = classifier(kind)
    scores = Reranker(folder, devices="cpu").compute_score(PAIRS)
    assert scores.dtype == np.float32 and scores.shape == (len(PAIRS),)
    assert_close(scores, one_by_one(folder, PAIRS))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_sentence_transformers(classifier, kind):
    import sentence_transformers as library

    folder = classifier(kind)
    peer = library.CrossEncoder(folder, device="cpu", activation_fn=torch.nn.Identity(), max_length=32)
    if peer.tokenizer.pad_token is None:
        peer.tokenizer.pad_token = "[SEP]"  # it refuses to work without one; nothing is padded below
    assert_close(Reranker(folder, devices="cpu").compute_score(PAIRS), peer.predict(PAIRS, batch_size=1))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_chunks_hold_pairs_of_similar_length_and_keep_the_order(classifier, kind):
    folder = classifier(kind)
    reranker = Reranker(folder, devices="cpu", batch_size=2)
    shapes = []
    reranker.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scores = reranker.compute_score(PAIRS)
    assert len(shapes) > 2 and all(rows * width <= 2 * 32 for rows, width in shapes)
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)
    assert_close(scores, one_by_one(folder, PAIRS))


def test_chunks_are_small_on_a_cpu(classifier):
    reranker = Reranker(classifier(), devices="cpu")
    shapes = []
    reranker.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    reranker.compute_score([("lane", SENTENCE)] * 200)
    assert sum(shapes) > 1.5 * module.CPU_TOKENS_PER_CHUNK >= 1.5 * max(shapes)


def test_normalize_is_the_sigmoid(classifier):
    reranker = Reranker(classifier(), devices="cpu")
    scores = reranker.compute_score(PAIRS, normalize=True)
    assert scores.dtype == np.float32
    assert_close(scores, 1 / (1 + np.exp(-reranker.compute_score(PAIRS).astype(np.float64))))


def test_no_pairs_have_no_scores(classifier):
    scores = Reranker(classifier(), devices="cpu").compute_score([])
    assert scores.shape == (0,) and scores.dtype == np.float32


def test_two_empty_texts_have_a_score(classifier):
    reranker = Reranker(classifier("gpt2"), devices="cpu")  # whose tokenizer adds nothing
    alone = reranker.compute_score([("", "")])
    assert np.isfinite(alone).all()
    np.testing.assert_allclose(reranker.compute_score([*PAIRS, ("", "")])[-1:], alone, atol=1e-5)


def test_decoder_without_padding_whose_texts_end_with_every_token(classifier):
    words = [f"w{i}" for i in range(60)]
    folder = classifier("llama", words=words)
    assert transformers.AutoConfig.from_pretrained(folder).pad_token_id is None
    # all 64 ids, each behind a text of another length
    ends = ["[PAD]", "!", "[CLS]", "[SEP]", *words]
    pairs = [("w1", " ".join([*words[: i % 7], end])) for i, end in enumerate(ends)]
    assert_close(Reranker(folder, devices="cpu").compute_score(pairs), one_by_one(folder, pairs))


@pytest.mark.parametrize("length", [8, 16])
def test_max_length_truncates_the_passage(classifier, length):
    folder = classifier()
    pairs = [("what is a lane", SENTENCE), ("lane", "block"), ("lane", SENTENCE)]
    reranker = Reranker(folder, devices="cpu", max_length=length)
    assert_close(reranker.compute_score(pairs), one_by_one(folder, pairs, length))


def test_query_is_truncated_first_between_tokens(classifier):
    folder = classifier()
    core = transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer
    row, s, block, first, last = (core.token_to_id(token) for token in ("row", "##s", "block", "[CLS]", "[SEP]"))
    # the cut falls into the second word
    result = Reranker(folder, devices="cpu", max_length=12, query_max_length=3).compute_score(
        [("rows rows rows", "block " * 20), ("rows rows rows", "block")]
    )
    ids = [first, row, s, row, last, *[block] * 6, last]
    short = [first, row, s, row, last, block, last]
    assert_close(result, [logit(folder, ids, [0] * 5 + [1] * 7), logit(folder, short, [0] * 5 + [1] * 2)])


def test_truncation_side_of_the_tokenizer(classifier):
    folder = classifier()
    configure_tokenizer(folder, truncation_side="left")
    pairs = [("lane", SENTENCE), ("block", SENTENCE)]
    assert_close(
        Reranker(folder, devices="cpu", max_length=12).compute_score(pairs),
        one_by_one(folder, [(query, " ".join(SENTENCE.split()[-8:])) for query, _ in pairs]),
    )


@pytest.mark.parametrize(
    ("positions", "tokenizer_says", "options", "expected"),
    [
        (32, None, {}, (32, 24)),
        (32, 16, {}, (16, 12)),
        (1024, None, {}, (512, 384)),
        (1024, 16, {"max_length": 20}, (20, 15)),
        (32, None, {"max_length": 64}, (32, 24)),
        (32, None, {"query_max_length": 7}, (32, 7)),
        (32, None, {"query_max_length": 64}, (32, 28)),  # three special tokens and one of the passage
    ],
)
def test_lengths(classifier, positions, tokenizer_says, options, expected):
    folder = classifier(max_position_embeddings=positions)
    if tokenizer_says:
        configure_tokenizer(folder, model_max_length=tokenizer_says)
    reranker = Reranker(folder, devices="cpu", **options)
    assert (reranker.max_length, reranker.query_max_length) == expected
    # the longest of both texts goes through
    assert np.isfinite(reranker.compute_score([("lane " * 2000, "block " * 2000)])).all()


def test_positions_after_the_padding_of_roberta(classifier):
    assert Reranker(classifier("roberta"), devices="cpu").max_length == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 4}, "max_length 4: expected at least 5, for a query, a passage and 3 special tokens"),
        ({"query_max_length": 0}, "query_max_length must be at least 1 token, found 0"),
        ({"devices": ["cpu", "cpu"]}, "runs on one device"),
    ],
)
def test_invalid_arguments_are_errors(classifier, options, message):
    folder = classifier()
    with pytest.raises(UserError, match=message):
        Reranker(folder, **{"devices": "cpu", **options})


def test_half_precision_is_off_on_a_cpu(classifier):
    folder = classifier()
    transformers.AutoModelForSequenceClassification.from_pretrained(folder).half().save_pretrained(folder)
    reranker = Reranker(folder, devices="cpu", use_fp16=True)
    assert not reranker.use_fp16
    assert {parameter.dtype for parameter in reranker.model.parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_half_precision_on_a_gpu(classifier):
    folder = classifier()
    reranker = Reranker(folder)
    assert reranker.use_fp16 and reranker.model.dtype == torch.float16
    expected = Reranker(folder, devices="cpu").compute_score(PAIRS)
    np.testing.assert_allclose(reranker.compute_score(PAIRS), expected, atol=0.02)
    np.testing.assert_allclose(Reranker(folder, use_fp16=False).compute_score(PAIRS), expected, atol=1e-3)


def test_slow_tokenizer(classifier, tmp_path):
    folder = classifier(vocab_size=26)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *dict.fromkeys([*SENTENCE.split(), "[MASK]"])]
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    slow = transformers.BertJapaneseTokenizer(str(tmp_path / "vocab.txt"), word_tokenizer_type="basic")
    (Path(folder) / "tokenizer.json").unlink()
    slow.save_pretrained(folder)
    configure_tokenizer(folder, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    reranker = Reranker(folder, devices="cpu")
    assert not reranker.tokenizer.is_fast
    assert_close(reranker.compute_score(PAIRS[:7]), one_by_one(folder, PAIRS[:7]))


def test_tokenizer_that_puts_the_passage_first(classifier):
    folder = classifier(words=["a", "b"])
    path = Path(folder) / "tokenizer.json"
    core = tokenizers.Tokenizer.from_file(str(path))
    core.post_processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$B $A", special_tokens=[])
    core.save(str(path))
    with pytest.raises(UserError, match=f"the tokenizer of {folder} does not put the passage after the query"):
        Reranker(folder, devices="cpu")


def test_head_without_weights_is_an_error(classifier):
    folder = classifier()
    transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForSequenceClassification"], "id2label": {"0": "score"}})
    )
    with pytest.raises(UserError, match="lacks weights: classifier.bias, classifier.weight"):
        Reranker(folder, devices="cpu")


def test_pooler_without_weights_is_an_error(tmp_path):
    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.DebertaV2Config(**size, intermediate_size=32, num_labels=1)
    model = transformers.DebertaV2ForSequenceClassification(config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler.")}
    assert len(weights) == len(model.state_dict()) - 2
    model.save_pretrained(tmp_path, state_dict=weights)
    tokenizer("bert").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lacks weights: pooler.dense.bias, pooler.dense.weight"):
        Reranker(str(tmp_path), devices="cpu")


def write_folder(folder: Path, **config) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_placeholders(folder)
    return str(folder)


BERT = ["BertForSequenceClassification"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["BertModel"]}, "BertModel does not score pairs; expected a cross-encoder"),
        ({}, "a model without a head does not score pairs; expected a cross-encoder"),
        ({"architectures": ["Qwen3ForCausalLM"]}, r"language models as rerankers \(Qwen3ForCausalLM\) are not supp"),
        ({"architectures": ["GPT2LMHeadModel"]}, r"language models as rerankers \(GPT2LMHeadModel\) are not supp"),
        ({"architectures": BERT}, "this classifier has 2 outputs; expected a cross-encoder"),
        ({"architectures": BERT, "id2label": {"0": "a", "1": "b", "2": "c"}}, "this classifier has 3 outputs"),
        (
            {
                "architectures": ["NewForSequenceClassification"],
                "id2label": {"0": "a"},
                "model_type": "new",
                "auto_map": {"AutoModelForSequenceClassification": "modeling.New"},
            },
            r"this model runs its own code \(modeling.New\); allow it by --trust_remote_code",
        ),
    ],
)
def test_other_kinds_of_models_are_errors(tmp_path, config, message):
    folder = write_folder(tmp_path / "model", **config)
    with pytest.raises(UserError, match=f"^--reranker {folder}: {message}"):
        check_reranker(folder, "--reranker")


@pytest.mark.parametrize(
    ("config", "trusted"),
    [
        ({"id2label": {"0": "LABEL_0"}}, False),
        ({"num_labels": 1}, False),
        ({"num_labels": 1, "auto_map": {"AutoModelForSequenceClassification": "x.Y"}, "model_type": "bert"}, False),
        ({"num_labels": 1, "auto_map": {"AutoModelForSequenceClassification": "x.Y"}, "model_type": "new"}, True),
    ],
)
def test_reranker_by_its_configuration(tmp_path, config, trusted):
    folder = write_folder(tmp_path / "model", architectures=BERT, **config)
    check_reranker(folder, "--reranker", trust_remote_code=trusted)


def test_incomplete_folders_are_errors(tmp_path):
    with pytest.raises(UserError, match="^--reranker /no/such: no such folder"):
        check_reranker("/no/such", "--reranker")
    folder = write_folder(tmp_path / "model", architectures=BERT, num_labels=1)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights here"):
        check_reranker(folder, "--reranker")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "model" / name).touch()
    with pytest.raises(UserError, match=f"^--reranker {folder}: adapters alone are not supported, merge them"):
        check_reranker(folder, "--reranker")


def test_unreachable_hub_is_an_error_on_loading():
    check_reranker("nobody/nothing", "--reranker")
    with pytest.raises(UserError, match="nobody/nothing does not load"):
        Reranker("nobody/nothing", devices="cpu")


def test_check_imports_no_torch_and_reranker_no_ray(tmp_path):
    folder = write_folder(tmp_path / "model", architectures=BERT, num_labels=1)
    code = f"""
import sys
from raybge.model.folder_checks import check_reranker
check_reranker({folder!r}, "--reranker")
assert "torch" not in sys.modules
import raybge.model.reranker
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
