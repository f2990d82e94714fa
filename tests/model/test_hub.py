"""A model on the hub: several workers of a node that load it at the same time download it once."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny import make_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPEN = "from raybge import Encoder; print(Encoder('owner/tiny').encode('what is a lane').shape)"


@pytest.fixture
def hub(tmp_path):
    """A local hub with the model owner/tiny, and the number of downloads of each file."""
    folder = Path(make_tiny(tmp_path / "model"))
    fetched: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self._answer(body=False)

        def do_GET(self):
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            name = (
                self.path.split("?")[0]
                .removeprefix("/owner/tiny/resolve/main/")
                .removeprefix(f"/owner/tiny/resolve/{COMMIT}/")
            )
            content = (folder / name).read_bytes() if name in os.listdir(folder) else None
            self.send_response(200 if content is not None else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
                self.send_header("ETag", f'"{name}"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if body and content is not None:
                fetched[name] += 1
                time.sleep(1)  # long enough for the others to ask for it too
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", fetched
    server.shutdown()


def test_workers_of_a_node_download_a_model_once(hub, tmp_path):
    endpoint, fetched = hub
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    workers = [
        subprocess.Popen([sys.executable, "-c", OPEN], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.communicate(timeout=300)[0] == "(16,)\n" and worker.returncode == 0
    assert fetched["model.safetensors"] == 1
    assert set(fetched.values()) == {1}, fetched
