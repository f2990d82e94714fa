"""Losses that are not finite of one of two workers: updates are skipped, and two in a row end the run."""

import numpy as np
import pytest
from faulty_runs import before_each_step, make_flags
from safetensors.numpy import load_file

from raybge.train import finetune
from raybge.training.checkpoint.manifest import latest_checkpoint
from raybge.util.errors import UserError

pytestmark = pytest.mark.usefixtures("worker_processes")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    return make_flags(tmp_path_factory.mktemp("inputs"))


def inject_nan(monkeypatch, offset_file, steps) -> None:
    """Set the embedding of worker 1's first query to nan in `steps`; `offset_file` gets the byte offset of its row."""

    def act(trainer, inputs) -> None:
        embedding = trainer.components.model.embedding
        if "embed" in vars(embedding):
            del embedding.embed
        if trainer.stream.rank == 1 and trainer.state.global_step in steps:
            original = embedding.embed

            def embed(*args):
                e_ND = original(*args).clone()
                e_ND[0] = float("nan")
                return e_ND

            embedding.embed = embed
            offset_file.write_text(str(inputs["batch"].rows[0][1]))

    before_each_step(monkeypatch, act)


@pytest.mark.parametrize("behind_host", [False, True], ids=["host decides", "device decides"])
def test_nonfinite_update_is_skipped_on_all_workers_and_two_in_a_row_end_the_run(
    flags, tmp_path, monkeypatch, capfd, behind_host
):
    """Updates 2, 4 and 5 are not finite on one of the workers: only the other two change the weights."""
    monkeypatch.setattr("raybge.training.callbacks.nonfinite_guard.runs_behind_host", lambda device: behind_host)
    inject_nan(monkeypatch, tmp_path / "offset", steps={1, 3, 4})
    output = tmp_path / "out"
    with pytest.raises(UserError, match="2 steps in a row") as error:
        finetune(**{**flags, "save_steps": 1}, output_dir=str(output), max_bad_steps=2, max_failures=3)
    row = f"{flags['train_data'][0]}:byte {int((tmp_path / 'offset').read_text()):,}"
    assert "step 5 (loss nan)" in str(error.value) and f"most likely cause first: {row}" in str(error.value)
    console = capfd.readouterr().err
    assert "step 2 is skipped (loss nan)" in console and "step 4 is skipped (loss nan)" in console
    assert latest_checkpoint(output).step == 4 and not (output / "modules.json").exists()
    one, two, three, four = (load_file(output / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3, 4))
    for before, after in ((one, two), (three, four)):
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value)
    assert all(np.isfinite(value).all() for value in three.values())
    assert any((three[name] != two[name]).any() for name in two)
