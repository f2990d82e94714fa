"""Declarations of flags: one canonical name for each idea, and every spelling of FlagEmbedding as an alias."""

import ast
import re
from pathlib import Path

import pytest

import raybge
from raybge.cli import options as all_options
from raybge.cli.options import EncodeOptions, EvaluateOptions, MineOptions, TrainOptions
from raybge.cli.options.common import GROUPS
from raybge.cli.parser import build_options, declared_flags, parse_options

CLASSES = [each for name, each in vars(all_options).items() if name.endswith("Options")]
# Spellings of FlagEmbedding 1.4.2's scripts and of earlier raybge, by the canonical name.
SPELLINGS = {
    MineOptions: {
        "embedder_name_or_path": "model_name_or_path",
        "candidate_pool": "corpus_data",
        "embedder_query_max_length": "query_max_len",
        "embedder_passage_max_length": "passage_max_len",
        "query_instruction_format_for_retrieval": "query_instruction_format",
        "passage_instruction_format_for_retrieval": "passage_instruction_format",
        "normlized": "normalize_embeddings",
        "reranker_name_or_path": "cross_encoder",
        "normalize": "normalize_scores",
    },
    TrainOptions: {
        "embedder_name_or_path": "model_name_or_path",
        "sentence_pooling_method": "pooling_method",
        "normlized": "normalize_embeddings",
    },
    EvaluateOptions: {
        "encoder": "model_name_or_path",
        "fp16": "use_fp16",
        "max_query_length": "query_max_len",
        "max_passage_length": "passage_max_len",
        "normlized": "normalize_embeddings",
    },
    EncodeOptions: {
        "embedder_name_or_path": "model_name_or_path",
        "query_instruction_format_for_retrieval": "query_instruction_format",
        "normlized": "normalize_embeddings",
    },
}
VALUES = {"bool": False, "int": 7, "float": 0.5, "str": "x"}


def required_values(options_class):
    return {f.name: VALUES[f.kind] for f in declared_flags(options_class).values() if f.required}


def test_there_are_options_of_every_command():
    assert len(CLASSES) >= 10


@pytest.mark.parametrize("options_class", CLASSES)
def test_no_spelling_means_two_flags(options_class):
    spellings = [spelling for f in declared_flags(options_class).values() for spelling in f.spellings]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize("options_class", CLASSES)
def test_each_flag_has_a_group_and_a_description(options_class):
    for f in declared_flags(options_class).values():
        assert f.transformers or (f.group in GROUPS and re.match(r"[\w`{]", f.help)), f.name


@pytest.mark.parametrize(
    ("options_class", "spelling", "name"), [(c, s, n) for c, names in SPELLINGS.items() for s, n in names.items()]
)
def test_a_spelling_sets_the_canonical_flag(options_class, spelling, name):
    flag = declared_flags(options_class)[name]
    value = flag.choices[0] if flag.choices else VALUES[flag.kind]
    expected = [value] if flag.many else value
    values = {**required_values(options_class)}
    values.pop(name, None)
    assert getattr(build_options(options_class, {**values, spelling: value}), name) == expected
    words = [word for each, text in {**values, spelling: value}.items() for word in (f"--{each}", str(text))]
    assert getattr(parse_options(options_class, words, "command"), name) == expected


def test_the_help_page_lists_aliases_after_the_description(capsys):
    with pytest.raises(SystemExit):
        parse_options(MineOptions, ["--help"], "mine")
    page = capsys.readouterr().out
    assert re.search(r"^  --corpus_data TEXT \[TEXT ...\] +passages", page, re.MULTILINE)
    assert "[alias: --candidate_pool]" in " ".join(page.split())
    assert not re.search(r"^  --candidate_pool", page, re.MULTILINE)


def test_the_same_idea_has_the_same_name_in_all_commands():
    """An alias of one command is not the canonical name of another command's flag."""
    flags = [f for each in CLASSES for f in declared_flags(each).values()]
    canonical = {f.name for f in flags if not f.transformers and not f.refused}
    aliases = {alias for f in flags for alias in f.aliases}
    assert canonical & aliases == set()


def test_flags_are_declared_in_options_alone():
    """Calls of `flag(...)` as a dataclass field stand in cli/options."""
    package = Path(raybge.__file__).parent
    declaring = {
        str(path.relative_to(package).parent)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)
        if isinstance(node.value.func, ast.Name) and node.value.func.id == "flag"
    }
    assert declaring == {"cli/options"}
