"""Files of a model that are meant to be published: those of the model, and nothing that lies next to them."""

import json
import shlex

from raybge.model.encoder import Encoder
from raybge.model.lora import Lora
from raybge.model.upload import model_files, upload_command, upload_obstacle

PRIVATE = (
    "report.html train_results.json trainer_state.json checkpoint-5/model.safetensors checkpoint-5/optimizer.pt "
    ".raybge/data/rows.jsonl rows/worker-0.arrow training_args.bin runs/events.out.tfevents.1 dev.jsonl"
).split()


def test_the_files_are_those_that_the_model_was_saved_with(tiny, tmp_path):
    folder = tmp_path / "out"
    Encoder(tiny(), devices="cpu").save(folder)
    (folder / "README.md").write_text("# Card")
    saved = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in PRIVATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")
    assert sorted(model_files(folder)) == saved and model_files(folder)[0] == "README.md"
    assert {"config.json", "modules.json", "model.safetensors", "1_Pooling/config.json"} <= set(saved)


def test_the_command_includes_each_file(tmp_path):
    folder = tmp_path / "my model"
    for name in ("README.md", "1_Pooling/config.json", *PRIVATE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    words = shlex.split(upload_command(folder))
    assert words[:5] == ["hf", "upload", "OWNER/NAME", str(folder), "."]
    assert words[5:] == ["--include", "README.md", "--include", "1_Pooling/config.json"]


def test_adapters_of_a_local_base_are_not_to_be_published(tiny, tmp_path):
    encoder = Encoder(tiny(), lora=Lora(rank=2, alpha=4), devices="cpu")
    encoder.save(tmp_path / "adapters")
    encoder.save(tmp_path / "merged", merge_adapters=True)
    assert "--save_merged_lora_model" in upload_obstacle(tmp_path / "adapters")
    assert upload_obstacle(tmp_path / "merged") is None
    path = tmp_path / "adapters" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "BAAI/bge-m3"}
    path.write_text(json.dumps(config))
    assert upload_obstacle(tmp_path / "adapters") is None
