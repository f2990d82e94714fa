"""The self-test: its checks pass here, and fail where what they check is broken."""

import json

import pytest
import torch
from packed_kernels import packed_kernels

from raybge.diagnostics import machine_checks as checks
from raybge.diagnostics.machine_checks import CheckFailedError, NeedsGpuError
from raybge.diagnostics.samples import GROUPS
from raybge.diagnostics.workers import shares_of
from raybge.selftest import main

CPU = torch.device("cpu")


def test_command_prints_and_writes_verdicts(tmp_path, monkeypatch, capfd):
    def broken(device: torch.device) -> str:
        raise CheckFailedError("relative error 0.5")

    def crashes(device: torch.device) -> str:
        raise RuntimeError("no kernel image\nmore")

    some = (checks.gradient_of_the_loss, broken, checks.packed_texts, crashes, checks.search)
    monkeypatch.setattr("raybge.diagnostics.run.CHECKS", some)
    path = tmp_path / "verdicts.json"
    assert main(["--device", "cpu", "--output_file", str(path)]) == 1
    written = json.loads(path.read_text())["checks"]
    assert [each["verdict"] for each in written] == ["pass", "FAIL", "needs a GPU", "FAIL", "pass"]
    assert written[3]["details"] == "RuntimeError: no kernel image"
    out, err = capfd.readouterr()
    assert "FAIL         broken                       relative error 0.5" in out + err
    assert "2 checks failed: broken, crashes" in out + err


@pytest.mark.parametrize(
    "check",
    [each for each in checks.CHECKS if each not in (checks.workers, checks.packed_texts)],
    ids=lambda c: c.__name__,
)
def test_checks_pass_on_a_cpu(check, monkeypatch):
    monkeypatch.setattr(checks, "MANY", 30)
    assert check(CPU)


def test_workers_have_the_gradient_of_one():
    assert "gloo, 2 and 3 workers" in checks.workers(CPU)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_shares_are_uneven_and_one_is_empty(world):
    shares = shares_of(world)
    assert len(shares) == world and sum(shares) == GROUPS
    assert world == 1 or len(set(shares)) > 1
    assert (min(shares) == 0) == (world > 2)


def test_packed_texts_need_a_gpu():
    with pytest.raises(NeedsGpuError):
        checks.packed_texts(CPU)


# --- each check fails where what it checks is broken ------------------------------------------------------------------


def break_loss(patch):
    patch.setattr("raybge.diagnostics.samples.Objective.loss", lambda self, q, p, *_: q.sum() + p.sum())


def break_chunks(patch):
    import contextlib

    patch.setattr("raybge.model.embedding.autocast_without_cache", lambda device: contextlib.nullcontext())


def break_scores(patch):
    terms = checks.softmax_terms
    patch.setattr(checks, "softmax_terms", lambda q, p, *rest: terms(q.bfloat16(), p.bfloat16(), *rest))


def break_workers(patch):
    patch.setattr(checks, "gradients_of_workers", lambda world, kind: {("DDP", torch.float32): torch.ones(1)})
    patch.setattr(checks, "distance", lambda one, other: 0.5)


def break_search(patch):
    import faiss

    patch.setattr(faiss.IndexFlatIP, "search", lambda self, q, k: (None, torch.zeros(50, 10).numpy()))


@pytest.mark.parametrize(
    ("check", "damage"),
    [
        (checks.gradient_of_the_loss, break_loss),
        (checks.sums_over_sub_batches, break_chunks),
        (checks.scores_with_tf32, break_scores),
        (checks.workers, break_workers),
        (checks.search, break_search),
    ],
    ids=lambda each: each.__name__,
)
def test_a_check_fails_where_the_machine_is_wrong(check, damage, monkeypatch):
    damage(monkeypatch)
    with pytest.raises(CheckFailedError):
        check(CPU)


def test_families_that_pack_are_named(monkeypatch):
    """With the kernels of a GPU replaced by loops."""
    monkeypatch.setattr(checks, "FAMILIES", ("bert", "modernbert", "qwen3"))
    device = type("Gpu", (), {"type": "cuda"})()
    build = checks.build_embedding
    monkeypatch.setattr(checks, "build_embedding", lambda family, device, dropout: build(family, CPU, dropout))
    with packed_kernels():
        assert checks.packed_texts(device) == "bert, qwen3 are packed, other families padded"
        with monkeypatch.context() as patch:
            patch.setattr(checks, "prepare_for_inference", lambda *_: "no kernel in fp16")
            with pytest.raises(CheckFailedError, match="bert: no kernel in fp16; qwen3: no kernel in fp16"):
                checks.packed_texts(device)
        monkeypatch.setattr(checks, "packing_failure", lambda *_: "no kernel")
        with pytest.raises(CheckFailedError, match="bert: no kernel; qwen3: no kernel"):
            checks.packed_texts(device)
