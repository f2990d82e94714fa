"""What runs in the precision of --bf16 beside the training step: evaluation, and the check of groups for overflows."""

import re

import pytest
import torch

from raybge.model.encoder import Encoder
from raybge.util.errors import UserError


class RecordingValidation:
    """Validation that embeds one text, as the real one does."""

    last_result = None

    def measure(self, encoder: Encoder, step: int = 0) -> dict[str, float]:
        with torch.no_grad():
            encoder.model.embed(encoder.tokenize(["what is a lane"], 8), 100)
        return {"nDCG@10": 0.5, "MRR@10": 0.5}


def test_evaluation_and_check_of_groups_run_in_the_precision_of_training(make_trainer):
    validation = RecordingValidation()
    trainer = make_trainer(validation=validation, bf16=True, max_steps=1)
    seen: list[torch.dtype] = []
    layer = trainer.encoder.model.backbone.encoder.layer[0].attention.self.query
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.train()
    assert seen and set(seen) == {torch.bfloat16}
    seen.clear()
    trainer.evaluate()
    assert seen == [torch.bfloat16]
    seen.clear()
    (batch,) = (inputs["batch"] for inputs in list(trainer.stream)[:1])
    assert trainer._finite_rows(batch) == [True] * 6
    assert seen and set(seen) == {torch.bfloat16}


def test_memory_that_runs_out_is_explained(make_trainer, monkeypatch):
    trainer = make_trainer(max_steps=1)

    def embed(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(trainer.components.model.embedding, "embed", embed)
    with pytest.raises(UserError) as raised:
        trainer.train()
    assert re.fullmatch(
        r"the GPU's memory ran out in step 1, whose largest chunk has 18 texts of up to \d+ tokens: give "
        r"--sub_batch_size 9 or less, or --gradient_checkpointing True \(CUDA out of memory. Tried to allocate .*\)",
        str(raised.value),
    )
