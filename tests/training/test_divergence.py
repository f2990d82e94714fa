"""Losses that are not finite, in real Ray Train workers: what is left out, and when a run ends."""

import numpy as np
import pytest
import ray
from disturbed import before_each_step, make_flags, start_ray
from safetensors.numpy import load_file

from raybge.train import finetune
from raybge.training.checkpoint.manifest import newest
from raybge.util.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def cluster():
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    return make_flags(tmp_path_factory.mktemp("given"))


def spoil(monkeypatch, note, steps) -> None:
    """On worker 1, the first query of a step in `steps` has an embedding of nan; which row it is stands in `note`."""

    def act(trainer, inputs) -> None:
        embedding = trainer.learner.model.embedding
        if "embed" in vars(embedding):
            del embedding.embed
        if trainer.stream.rank == 1 and trainer.state.global_step in steps:
            whole = embedding.embed

            def embed(*args):
                e_ND = whole(*args).clone()
                e_ND[0] = float("nan")
                return e_ND

            embedding.embed = embed
            note.write_text(str(inputs["batch"].rows[0][1]))

    before_each_step(monkeypatch, act)


def test_a_bad_step_is_left_out_on_all_workers_and_two_in_a_row_end_the_run(flags, tmp_path, monkeypatch, capfd):
    """Steps 2, 4 and 5 are bad, on one of the workers: only the other two change the weights."""
    spoil(monkeypatch, tmp_path / "row", steps={1, 3, 4})
    output = tmp_path / "out"
    with pytest.raises(UserError, match="2 steps in a row") as error:
        finetune(**{**flags, "save_steps": 1}, output_dir=str(output), max_bad_steps=2, max_failures=3)
    row = f"groups.jsonl:byte {int((tmp_path / 'row').read_text()):,}"
    assert "step 5 (loss nan)" in str(error.value) and f"likeliest cause first: {row}" in str(error.value).replace(
        flags["train_data"][0].removesuffix("groups.jsonl"), ""
    )
    said = capfd.readouterr().err
    assert "step 2 is left out (loss nan)" in said and "step 4 is left out (loss nan)" in said
    assert newest(output).step == 4 and not (output / "modules.json").exists()
    one, two, three, four = (load_file(output / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3, 4))
    for before, after in ((one, two), (three, four)):
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value)
    assert all(np.isfinite(value).all() for value in three.values())
    assert any((three[name] != two[name]).any() for name in two)
