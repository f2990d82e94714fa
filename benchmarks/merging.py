"""Memory of merging three models of 400 MB, and the metrics of a fine-tuned model merged with its base.

    python benchmarks/merging.py memory --out runs/bench/merging-memory.json
    python benchmarks/merging.py curve --tuned runs/mine --out runs/bench/merging-curve.json

memory: three BERTs of 100 million random weights (400 MB each) are merged with the code of `raybge.merge`, in a
process of its own that samples its anonymous memory (RssAnon of /proc, which requires Linux). Pages of mapped files are
not counted, since the system can reclaim them. The baseline is the same process after imports and the alignment of the
models. The claim: at most 400 MB more, with each method. --layers makes larger models.

curve: `raybge.merge --search` on medquad's dev split as the target, searched in its corpus, and on the general set of
--general (groups {query, pos, neg} of another domain; default: docstrings of installed packages, as in the demo).
--tuned is a model that was fine-tuned on medquad, --base the model before fine-tuning. The claim: with weights of 0.5,
the merged model keeps at least 95% of the gain of fine-tuning on the target. The curve shows the gain of other weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common

LIMIT_MB = 400
KEPT_SHARE = 0.95  # of the gain
METHODS = ("linear", "slerp", "ties")


# --- memory -----------------------------------------------------------------------------------------------------------


def anonymous_memory() -> int:
    """Return the bytes of this process that belong to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no RssAnon")


def make_models(folder: Path, layers: int) -> list[str]:
    """Write three random BERTs of `layers` layers, tensor by tensor, and return their folders."""
    import torch
    import transformers

    from raybge.model.tensor_files import TensorSpec, write_tensors

    config = transformers.BertConfig(vocab_size=common.WORDS + 4, num_hidden_layers=layers, architectures=["BertModel"])
    with torch.device("meta"):
        shapes = transformers.BertModel(config, add_pooling_layer=False).state_dict()
    names = []
    for seed in range(3):
        place = folder / f"model-{seed}"
        place.mkdir()
        config.save_pretrained(place)
        common.write_words(place)
        random = torch.Generator().manual_seed(seed)
        slots = [TensorSpec(name, torch.float32, tuple(each.shape)) for name, each in shapes.items()]
        write_tensors(
            place, slots, lambda name, r=random: [torch.randn(shapes[name].numel(), generator=r)], lambda: None
        )
        names.append(str(place))
    return names


def merging_peak(names: list[str], method: str, output: Path) -> dict[str, float]:
    """Measure the anonymous memory of this process before and during a merge, in MB."""
    from raybge.merging.alignment import AlignedModels

    is_ties = method == "ties"
    aligned = AlignedModels(names[: 2 if method != "linear" else 3], "encoder", names[2] if is_ties else None)
    weights = [0.2, 0.3, 0.5] if method == "linear" else [0.4, 0.6]
    before = anonymous_memory()
    peak, stop = [before], threading.Event()

    def sample() -> None:
        while not stop.is_set():
            peak[0] = max(peak[0], anonymous_memory())
            time.sleep(0.002)

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.monotonic()
    aligned.write(output, weights, method, 0.2, lambda: None)
    seconds = time.monotonic() - start
    stop.set()
    sampler.join()
    return {
        "model_mb": aligned.bytes / 1e6,
        "baseline_mb": before / 1e6,
        "added_mb": (peak[0] - before) / 1e6,
        "seconds": seconds,
    }


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the memory of each merge method."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        names = make_models(Path(work), args.layers)
        for method in args.methods:
            output = Path(work) / method
            output.mkdir()
            command = [sys.executable, __file__, "child", "--methods", method, "--work", str(output), "--names", *names]
            process = subprocess.run(command, check=True, capture_output=True, text=True)
            results[method] = json.loads(process.stdout.splitlines()[-1])
            print(
                method + ": " + ", ".join(f"{name} {value:,.1f}" for name, value in results[method].items()), flush=True
            )
    worst = max(each["added_mb"] for each in results.values())
    print(f"at most {worst:,.1f} MB above the baseline; the claim is {LIMIT_MB}")
    if worst > LIMIT_MB:
        raise SystemExit(f"merging took {worst:,.1f} MB above the baseline, the claim is {LIMIT_MB}")
    return {"limit_mb": LIMIT_MB, "methods": results}


# --- metrics over the weight ------------------------------------------------------------------------------------------


def curve(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the merged model on target and general set over the weight of the fine-tuned model."""
    from raybge.merge import mix_models

    work = Path(args.work or "runs/bench/merging")
    work.mkdir(parents=True, exist_ok=True)
    common.write_judged(work, args.queries, args.corpus)
    general = args.general or docstrings(work)
    models = [args.tuned, args.base]
    result = mix_models(
        [limit_length(model, work / str(i), args.length) for i, model in enumerate(models)] if args.length else models,
        "encoder",
        None,
        str(work / "mixed"),
        search=str(work / "dev.jsonl"),
        search_corpus=str(work / "corpus.jsonl"),
        general=general,
        max_evaluations=args.evaluations,
        overwrite=True,
        return_model=False,
    )
    candidates = sorted(map(asdict, result.candidates), key=lambda each: each["weights"])
    base, half, tuned = (next(each for each in candidates if each["weights"][0] == w) for w in (0.0, 0.5, 1.0))
    gain = tuned["target"] - base["target"]
    kept_share = (half["target"] - base["target"]) / gain if gain else float("nan")
    for each in candidates:
        print(f"{each['weights'][0]:.3f} tuned: target {each['target']:.4f}, general {each['general']:.4f}")
    print(f"a half of each keeps {kept_share:.1%} of a gain of {gain:+.4f}; the claim is {KEPT_SHARE:.0%}")
    return {"summary": asdict(result), "gain": gain, "kept_by_half": kept_share}


def limit_length(model: str, folder: Path, length: int) -> str:
    """Write a copy of a model that reads at most `length` tokens of a text."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    settings = folder / "sentence_bert_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_seq_length": length}))
    return str(folder)


def docstrings(work: Path) -> str:
    """Write the demo's docstrings and return the path of the held-out queries."""
    from raybge.quickstart import docstrings as demo_text

    demo_text.write_data_set(work / "general", 42)
    return str(work / "general/dev.jsonl")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("what", choices=("memory", "curve", "child"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--layers", type=int, default=11, help="layers of the models; 11 are 404 MB")
    parser.add_argument("--work", help="folder for models and files")
    parser.add_argument("--names", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--tuned", help="model that was fine-tuned on medquad")
    parser.add_argument("--base", default=None, help="model before fine-tuning; default: MiniLM")
    parser.add_argument("--general", help="groups of another domain")
    parser.add_argument("--queries", type=int, default=700)
    parser.add_argument("--corpus", type=int, default=3000, help="passages to search in")
    parser.add_argument("--length", type=int, help="tokens of a text; default: the maximum of each model")
    parser.add_argument("--evaluations", type=int, default=15)
    args = parser.parse_args()
    if args.what == "child":
        print(json.dumps(merging_peak(args.names, args.methods[0], Path(args.work))))
        return
    if args.what == "memory":
        common.write_result(memory(args), args.out)
        return
    if not args.tuned or not common.MEDQUAD.is_dir():
        raise SystemExit(f"--tuned must be a model, and medquad must be at {common.MEDQUAD}")
    args.base = args.base or common.minilm()
    common.write_result(curve(args), args.out)


if __name__ == "__main__":
    main()
