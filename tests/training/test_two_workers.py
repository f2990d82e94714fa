"""Two workers as processes with gloo, without Ray: checkpoints, resumes and results equal those of one worker."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
from process_runtime import run_in_processes
from tiny import make_tiny
from trainers import build_survey, build_trainer, weights

from raybge.data.survey import Survey
from raybge.training.checkpoint.manifest import latest_checkpoint

FLAGS = dict(optim="sgd", learning_rate=0.05, max_steps=12, save_strategy="steps", save_steps=4, save_total_limit=2)


def work(rank: int, port: int, data: Survey, model: str, folder: str, start: str | None, flags: dict[str, Any]) -> None:
    """Train as worker `rank` of two; write the checkpoints reported on this worker and its weights."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    reported: list[str] = []
    trainer = build_trainer(data, model, Path(folder), rank=rank, world=2, on_checkpoint=reported.append, **flags)
    trainer.train(resume_from_checkpoint=start)
    trainer.writer.close()
    torch.save((reported, weights(trainer), trainer.state.num_input_tokens_seen), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def train_on_two(data: Survey, model: str, folder: Path, start: str | None = None, **flags: Any) -> list[tuple]:
    """Train on two workers; return what each wrote."""
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run_in_processes(work, (port, data, model, str(folder), start, FLAGS | flags), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_equal_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-5, rtol=0, msg=name)


def test_two_workers_save_resume_and_equal_one(tmp_path):
    data, model = build_survey(tmp_path), make_tiny(tmp_path / "model", dropout=0.0)
    flags = dict(include_num_input_tokens_seen="all")
    alone = build_trainer(data, model, tmp_path / "alone", **FLAGS, **flags)
    alone.train()
    results = train_on_two(data, model, tmp_path / "both", **flags)
    paths = [str(tmp_path / "both" / f"checkpoint-{step}") for step in (4, 8, 12)]
    for reported, own_weights, tokens in results:
        assert reported == paths
        assert_equal_weights(own_weights, weights(alone))
        assert tokens == alone.state.num_input_tokens_seen > 0
    assert latest_checkpoint(tmp_path / "both").step == 12
    resumed = train_on_two(data, model, tmp_path / "resumed", start=paths[1], **flags)
    assert all(reported == [str(tmp_path / "resumed" / "checkpoint-12")] for reported, *_ in resumed)
    assert_equal_weights(resumed[0][1], weights(alone))
