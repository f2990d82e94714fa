"""Encoding by each backend and precision, of raybge and of sentence-transformers: part `backends` of encoding.py.

Each contestant is a process that encodes the same parts of the texts in turn. sentence-transformers' own ONNX and
OpenVINO backends require an older transformers than raybge: `--onnx_python` and `--openvino_python` are interpreters
that have them. Both then run the same int8 file, which `raybge.export` writes, calibrated on passages that are not
measured.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import common
import numpy as np

LENGTH, BATCH = 256, 32
PEER = "sentence-transformers"
PACKAGES = ("torch", "transformers", "sentence-transformers", "onnxruntime", "openvino", "nncf")
OURS = (("torch", "fp32"), ("torch", "bf16"), ("openvino", "int8"), ("onnx", "int8"))


def contestant(library: str, backend: str, precision: str, folder: str, threads: int) -> Callable[[list[str]], Any]:
    """Return a function from texts to vectors."""
    import torch

    torch.set_num_threads(threads)
    if library == "raybge":
        from raybge import Encoder

        ours = Encoder(
            folder, devices="cpu", passage_max_length=LENGTH, encode_backend=backend, encode_precision=precision
        )
        return lambda texts: ours.encode_corpus(texts, show_progress_bar=False)
    from sentence_transformers import SentenceTransformer

    options: dict[str, Any] = {"dtype": torch.bfloat16} if precision == "bf16" else {}
    if backend != "torch":
        options = {
            "file_name": next(Path(folder, backend).glob("*qint8*.onnx" if backend == "onnx" else "*qint8*.xml")).name
        }
        if backend == "onnx":
            import onnxruntime

            options["session_options"] = onnxruntime.SessionOptions()
            options["session_options"].intra_op_num_threads = threads
        else:
            options["ov_config"] = {"INFERENCE_NUM_THREADS": threads}
    peer = SentenceTransformer(folder, backend=backend, device="cpu", model_kwargs=options)
    peer.max_seq_length = LENGTH
    return lambda texts: peer.encode(texts, batch_size=BATCH, show_progress_bar=False)


def work(arguments: Sequence[str]) -> None:
    """Encode the parts that stdin names, and print the CPU seconds of each; the vectors become files."""
    library, backend, precision, folder, texts_file, out, threads = arguments
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    texts = json.loads(Path(texts_file).read_text())
    encode = contestant(library, backend, precision, folder, int(threads))
    encode(texts[:BATCH])  # excludes the first call's preparations
    versions = {name: found for name in PACKAGES if (found := _version(name))}
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        number, parts = map(int, line.split())
        before, start = _cpu_seconds(), time.monotonic()
        vectors = encode(texts[number::parts])
        seconds = {"cpu": _cpu_seconds() - before, "wall": time.monotonic() - start}
        np.save(f"{out}-{number}.npy", np.asarray(vectors, np.float32))
        print(json.dumps(seconds), file=answers, flush=True)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def run(
    texts: list[str], samples: list[str], model: str, parts: int, threads: int, peers: dict[str, str]
) -> dict[str, Any]:
    """Measure all contestants, part by part in turn.

    Args:
        texts: passages.
        samples: other passages, for the calibration of int8.
        model: folder of the model.
        parts: number of parts.
        threads: threads of each contestant.
        peers: interpreter by backend, for those of sentence-transformers.

    Returns:
        The result.
    """
    with tempfile.TemporaryDirectory() as work_folder:
        work_path = Path(work_folder)
        (work_path / "texts.json").write_text(json.dumps(texts))
        folders = _exports(model, samples, work_path)
        names = [("raybge", *each) for each in OURS]
        names += [(PEER, "torch", "fp32"), (PEER, "torch", "bf16"), *((PEER, backend, "int8") for backend in peers)]
        workers, versions = {}, {}
        for name in names:
            library, backend, precision = name
            folder = folders.get((backend, precision), model)
            python = peers.get(backend, sys.executable) if library == PEER else sys.executable
            words = [*name, folder, str(work_path / "texts.json"), str(work_path / "-".join(name)), str(threads)]
            # an interpreter of its own environment must not find this one's packages
            environment = {k: v for k, v in os.environ.items() if python == sys.executable or k != "PYTHONPATH"}
            workers[name] = subprocess.Popen(
                [python, "-W", "ignore", __file__, *words],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(work_path / ("-".join(name) + ".log")).open("w"),
                text=True,
            )
            versions[name] = _answer(workers[name], name, work_path)
        seconds = {name: {"cpu": 0.0, "wall": 0.0} for name in names}
        for number in range(parts):
            for name in names[:: 1 if number % 2 else -1]:
                process = workers[name]
                assert process.stdin
                process.stdin.write(f"{number} {parts}\n")
                process.stdin.flush()
                for kind, value in _answer(process, name, work_path).items():
                    seconds[name][kind] += value
        for process in workers.values():
            process.communicate()
        exact = _vectors(work_path, ("raybge", "torch", "fp32"), parts)
        cosines = {name: (_vectors(work_path, name, parts) * exact).sum(axis=1) for name in names}
    return _report(names, seconds, cosines, versions, len(texts))


def _exports(model: str, samples: list[str], work_path: Path) -> dict[tuple[str, str], str]:
    import raybge

    (work_path / "samples.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in samples))
    folders = {}
    for backend, precision in OURS:
        if backend != "torch":
            folders[backend, precision] = str(work_path / f"{backend}-{precision}")
            raybge.export_model(
                model_name_or_path=model,
                output_dir=folders[backend, precision],
                encode_backend=backend,
                encode_precision=precision,
                sample_data=[str(work_path / "samples.jsonl")],
            )
    return folders


def _answer(process: subprocess.Popen[str], name: tuple[str, ...], folder: Path) -> dict[str, Any]:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        log = (folder / f"{'-'.join(name)}.log").read_text().strip().splitlines()[-5:]
        raise SystemExit("\n".join([f"{' '.join(name)}: the process ended with {process.wait()}", *log]))
    return dict(json.loads(line))


def _vectors(folder: Path, name: tuple[str, ...], parts: int) -> np.ndarray:
    vectors = np.concatenate([np.load(folder / f"{'-'.join(name)}-{number}.npy") for number in range(parts)])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _report(
    names: list[tuple[str, ...]],
    seconds: dict[tuple[str, ...], dict[str, float]],
    cosines: dict[tuple[str, ...], np.ndarray],
    versions: dict[tuple[str, ...], dict[str, str]],
    texts: int,
) -> dict[str, Any]:
    """Print a line for each contestant and the ratios; return all figures."""
    cpu = {name: each["cpu"] for name, each in seconds.items()}
    plain = cpu[PEER, "torch", "fp32"]
    print(f"CPU: {', '.join(common.cpu_flags()) or 'none of the instructions for bf16 and int8'}")
    for name in names:
        print(
            f"{' '.join(name):40} {texts / cpu[name]:7.1f} passages per CPU second, {plain / cpu[name]:5.2f} times "
            f"{PEER} as it comes, cosine to fp32 {cosines[name].mean():.4f} (least {cosines[name].min():.4f})"
        )
    ratios = {}
    for kind in ("bf16", "int8"):
        ours = min((cpu[name], name) for name in names if name[0] == "raybge" and name[2] == kind)
        peers = [(cpu[name], name) for name in names if name[0] == PEER and (name[2] == kind or kind == "int8")]
        best = min(peers)
        ratios[kind] = round(best[0] / ours[0], 3)
        ratios[f"{kind} as it comes"] = round(plain / ours[0], 3)
        print(f"raybge {' '.join(ours[1][1:])} is {ratios[kind]:.2f} times as fast as {' '.join(best[1])}")
    return {
        "passages": texts,
        "seconds": {" ".join(name): {kind: round(value, 2) for kind, value in seconds[name].items()} for name in names},
        "cosine": {" ".join(name): [round(float(each.mean()), 5), round(float(each.min()), 5)]
                   for name, each in cosines.items()},
        "versions_of_each": {" ".join(name): each for name, each in versions.items()},
        "ratios": ratios,
    }  # fmt: skip


if __name__ == "__main__":
    work(sys.argv[1:])
