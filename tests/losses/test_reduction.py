"""DistributedDataParallel sums gradients over workers while the backward pass computes those that are left."""

import os

import pytest
import torch
from process_runtime import run_in_processes
from test_objective import batch_of, model_of


def one_worker(rank: int, way: str, folder: str) -> None:
    """Save the order of reductions and of the layers' backward passes in a step."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=1)
    model = model_of("cross-worker", way)
    parallel = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.02)  # some buckets for a tiny model
    events: list[str] = []

    def reduce(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        events.append("reduction")
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    parallel.register_comm_hook(None, reduce)
    for number, layer in enumerate(model.embedding.backbone.encoder.layer):
        layer.register_full_backward_hook(lambda *_, number=number: events.append(f"layer {number}"))
    for _ in range(2):  # the buckets get their order in the first step
        events.clear()
        parallel(batch_of(0, 8, alone=False)).backward()
    torch.save(events, os.path.join(folder, "events"))
    os._exit(0)


@pytest.mark.parametrize("way", ["plain", "sub-batched", "by tokens"])
def test_gradients_are_reduced_during_the_backward_pass(tmp_path, way):
    """With sub-batches a gradient is complete, and reduced, in the last of them."""
    run_in_processes(one_worker, (way, str(tmp_path)), 1)
    events = torch.load(tmp_path / "events")
    assert events.count("reduction") >= 3
    assert events.index("reduction") < len(events) - 1 - events[::-1].index("layer 0")
