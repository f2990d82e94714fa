"""Damaged model folders: vectors equal those of the whole folder, or a UserError names the folder."""

from collections import Counter

import pytest
from damages import Damage, is_other_model, make_folders, outcome, vectors

DAMAGES = 63  # `make soak` makes 2,000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return [(folder, vectors(folder)) for folder in make_folders(tmp_path_factory.mktemp("whole"))]


def test_damaged_folders_never_give_wrong_vectors(whole, tmp_path):
    results = Counter()
    for seed in range(DAMAGES):
        folder, expected = whole[seed % len(whole)]
        done, result = outcome(folder, tmp_path, expected, seed)
        assert result != "different" or is_other_model(done), (folder.name, seed, done)
        results[result] += 1
    assert results["refused"] >= 20 and results["equal"] >= 5  # damages of both kinds are made


def test_other_models_are_settings_only():
    assert is_other_model(Damage("key removed", "modules.json", "2"))
    assert not is_other_model(Damage("key removed", "modules.json", "1"))
    assert not is_other_model(Damage("cut", "sentence_bert_config.json"))
    assert not is_other_model(Damage("key removed", "1_Pooling/config.json", "pooling_mode"))
    assert not is_other_model(Damage("tensor nan", "model.safetensors", "embeddings"))
