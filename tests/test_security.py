"""A model folder is data: its code and pickles run only with --trust_remote_code. Names in data are never used as
paths. On one machine all sockets listen on loopback addresses.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from tiny import make_classifier, make_tiny

from raybge.cli import options as all_options
from raybge.cli.parser import declared_flags
from raybge.cluster import process_group as network
from raybge.data.groups import parse_group
from raybge.data.qrels import join, parse_query, read_qrels
from raybge.data.source_files import list_files
from raybge.data.survey import survey
from raybge.data.transcode import transcode
from raybge.losses.retromae_loading import load_pretraining_model
from raybge.merging.sources import SourceModel, load_source_tokenizer
from raybge.model.encoder import Encoder
from raybge.model.folder import FolderSettings
from raybge.model.loading import ModelLocation, load_tokenizer
from raybge.model.lora import Lora
from raybge.model.reranker import Reranker
from raybge.model.tensor_files import mapped_tensors
from raybge.tuning.held_out_split import split_held_out
from raybge.util.errors import UserError

WEIGHTS, ADAPTERS = "model.safetensors", "adapter_model.safetensors"
UNPICKLED = "ran"  # the file that a trap creates


class Trap:
    """An object that creates a file when it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place / UNPICKLED), "w")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """An embedding model, adapters for it, a reranker."""
    top = tmp_path_factory.mktemp("models")
    make_tiny(top / "encoder", mask=True)
    adapted = Encoder(str(top / "encoder"), lora=Lora(rank=2, alpha=4), devices="cpu")
    adapted.save(top / "adapters")
    make_classifier(top / "reranker")
    return {name: top / name for name in ("encoder", "adapters", "reranker")}


# --- pickles ----------------------------------------------------------------------------------------------------------

OPEN = {
    "encoder": lambda folder: Encoder(folder, devices="cpu"),
    "reranker": lambda folder: Reranker(folder, devices="cpu"),
    "pre-training": load_pretraining_model,
    "examples of a merge": lambda folder: SourceModel.open(folder, "encoder", "--f").load("encoder"),
    "merge": lambda folder: mapped_tensors(Path(folder)),
    "adapters": lambda folder: Encoder(folder, devices="cpu"),
    "adapters, trained further": lambda folder: Encoder(folder, devices="cpu", lora=Lora(rank=2, alpha=4)),
}


def as_pickle(folder: Path, to: Path, trap: Trap | None) -> str:
    """Copy a model with its weights, and the trap among them, in a .bin file."""
    from safetensors.torch import load_file

    shutil.copytree(folder, to)
    for was, name in ((WEIGHTS, "pytorch_model.bin"), (ADAPTERS, "adapter_model.bin")):
        if (to / was).is_file():
            torch.save({**load_file(to / was), **({"trap": trap} if trap else {})}, to / name)
            (to / was).unlink()
    return str(to)


def model_for(way: str, models: dict[str, Path]) -> Path:
    return models[next((name for name in models if way.startswith(name)), "encoder")]


@pytest.mark.parametrize("way", OPEN)
def test_no_pickle_is_run(way, models, tmp_path):
    folder = as_pickle(model_for(way, models), tmp_path / "model", Trap(tmp_path))
    with pytest.raises(UserError, match="load|tensors alone|do not fit"):
        OPEN[way](folder)
    assert not (tmp_path / UNPICKLED).exists()
    torch.load(next(Path(folder).glob("*.bin")), weights_only=False)  # the trap is one
    assert (tmp_path / UNPICKLED).exists()


@pytest.mark.parametrize("way", OPEN)
def test_weights_in_a_pickle_are_read(way, models, tmp_path):
    """They equal those of the folder with safetensors; new weights follow from the seed."""
    found = []
    for folder in (str(model_for(way, models)), as_pickle(model_for(way, models), tmp_path / "model", None)):
        torch.manual_seed(0)
        opened = OPEN[way](folder)
        module = opened if isinstance(opened, dict | torch.nn.Module) else opened.model
        found.append(module if isinstance(module, dict) else module.state_dict())
    expected, read = found
    assert expected and read.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(read[name][:], value[:], rtol=0, atol=0)


# --- code -------------------------------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
import transformers

Path({place!r}).touch()


class TrapConfig(transformers.BertConfig):
    model_type = "trap"


class TrapModel(transformers.BertModel):
    config_class = TrapConfig


class TrapTokenizer(transformers.PreTrainedTokenizerFast):
    pass
"""


def with_code(folder: Path, to: Path, place: Path) -> str:
    """Copy a model and give it code of its own for configuration, model and tokenizer, which creates a file."""
    shutil.copytree(folder, to)
    (to / "trap.py").write_text(CODE.format(place=str(place)))
    autos = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification")
    own = {"AutoConfig": "trap.TrapConfig", **dict.fromkeys(autos, "trap.TrapModel")}
    change(to / "config.json", model_type="trap", auto_map=own)
    tokens = {"AutoTokenizer": [None, "trap.TrapTokenizer"]}
    change(to / "tokenizer_config.json", tokenizer_class="TrapTokenizer", auto_map=tokens)
    return str(to)


def change(path: Path, **more) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


RUN = {
    **{name: OPEN[name] for name in ("encoder", "reranker", "pre-training", "examples of a merge")},
    "tokenizer": lambda folder: load_tokenizer(ModelLocation(folder, FolderSettings()), None, True),
    "tokenizer of a merge": lambda folder: load_source_tokenizer(SourceModel.open(folder, "encoder", "--f")),
}


@pytest.mark.parametrize("way", RUN)
def test_no_code_of_a_model_is_run(way, models, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # no prompt
    folder = with_code(model_for(way, models), tmp_path / "model", tmp_path / UNPICKLED)
    with pytest.raises(UserError):
        RUN[way](folder)
    assert not (tmp_path / UNPICKLED).exists()


def test_code_runs_with_trust_remote_code(models, tmp_path):
    folder = with_code(models["encoder"], tmp_path / "model", tmp_path / UNPICKLED)
    Encoder(folder, devices="cpu", trust_remote_code=True)
    assert (tmp_path / UNPICKLED).exists()


def test_every_command_has_trust_off():
    classes = [vars(all_options)[name] for name in all_options.__all__ if name.endswith("Options")]
    flags = [flag for each in classes if (flag := declared_flags(each).get("trust_remote_code"))]
    assert len(flags) >= 8 and all(f.default is False for f in flags)


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = ["../../out", "/tmp/out", "..", "a/../../b", "~/x", "C:\\x", "s3://bucket/x", "\0", "..\n/x"]


def everything(top: Path) -> set[Path]:
    return {path for path in top.rglob("*") if path.is_file()}


def test_a_file_name_chooses_no_path(tmp_path):
    """Decompressed copies of listed files are written to the run's own folder."""
    data = tmp_path / "data" / "deep"
    data.mkdir(parents=True)
    packed = pa.Codec("zstd").compress(b'{"query": "q", "pos": "p"}\n', asbytes=True)
    names = [
        "a...jsonl.zst",
        "a%2F..%2F..%2Fout.jsonl.zst",
        "-rf.jsonl.zst",
        "$(touch out).jsonl.zst",
        "a\nb.jsonl.zst",
    ]
    for name in names:
        (data / name).write_bytes(packed)
    before = everything(tmp_path)
    files = transcode(list_files(str(data), "--f"), str(tmp_path / "data" / "work"))
    assert len(files) == len(names)
    new = everything(tmp_path) - before
    assert len(new) == len(names) and {path.parent for path in new} == {tmp_path / "data" / "work"}


def test_ids_and_texts_of_rows_choose_no_path(tmp_path):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    rows = [{"_id": name, "query": name, "text": name, "pos": name, "prompt": name, "name": name} for name in NAMES]
    (inside / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{name}\t{name}\t1\n" for name in NAMES if "\n" not in name]
    (inside / "qrels.tsv").write_text("".join(lines))
    before = everything(tmp_path)
    files = list_files(str(inside / "rows.jsonl"), "--f")
    found = join(survey(files, 100, parse_query), read_qrels(str(inside / "qrels.tsv"), "--q"), str(inside / "j.jsonl"))
    assert found.queries == len(lines)
    split = split_held_out(survey(files, 100, parse_group), 0.3, 0, inside / "split")
    new = everything(tmp_path) - before
    assert new == {inside / "j.jsonl", *(Path(split.train).parent).iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_a_task_name_chooses_no_path(name):
    from raybge.evaluation.mteb import find_tasks

    with pytest.raises(UserError, match="--mteb_tasks"):
        find_tasks([name])


# --- sockets ----------------------------------------------------------------------------------------------------------

# Listening sockets of this process and all its children, while an actor runs.
LISTENING = """
import json, sys, psutil
if "first" in sys.argv:
    import ray
from raybge.cluster.connection import connect

with connect() as cluster:
    import ray

    class Actor:
        def ready(self):
            return True

    actor = ray.remote(Actor).remote()
    ray.get(actor.ready.remote())
    own = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [(each.name(), *c.laddr) for each in own for c in each.net_connections("inet") if c.status == "LISTEN"]
    print(json.dumps([cluster.own, found]))
"""


@pytest.mark.alone  # starts a Ray of its own
@pytest.mark.parametrize("imported", ["first", "later"])
def test_ray_on_one_machine_listens_on_loopback(imported):
    """This holds in a program that imported Ray earlier as well, when Ray has already read its environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # A temporary folder without other heads; its name is short because socket paths have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        environment |= {"RAY_TMPDIR": folder, "TMPDIR": folder}
        output = subprocess.check_output(
            [sys.executable, "-c", LISTENING, imported], env=environment, text=True, timeout=200
        )
    own, found = json.loads(output.splitlines()[-1])
    assert own and len(found) >= 4 and any("raylet" in name for name, *_ in found)
    assert {address.removeprefix("::ffff:") for _, address, _ in found} <= {"127.0.0.1", "::1"}, found
    assert not [each for each in found if each[2] == 8265]  # no dashboard at all


def test_the_store_of_the_workers_listens_on_loopback(monkeypatch):
    """torch's own store listens on all addresses and asks for no password."""
    import psutil
    import ray

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(network, "_store", None)
    address, port = network.host_store()
    client = torch.distributed.TCPStore(address, port, is_master=False)
    client.set("key", "value")
    listens = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.laddr.port == port and not c.raddr]
    assert client.get("key") == b"value" and listens == ["127.0.0.1"]
