"""OpenAI-compatible endpoint that runs in the test, behind a real HTTP server, and fails on request.

It grades a passage by a hash of query and passage, so that every answer is known in advance.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "judge-1"
# Faults: the response to one request.
LIMITED, ERROR, BROKEN, CUT_OFF, DROPPED, SLOW, NONSENSE, OBEDIENT, SHORT = (
    *("limited", "error", "broken", "cut off", "dropped", "slow", "nonsense", "obedient", "short"),
)
SLOW_SECONDS = 3.0
TEXTS = {
    NONSENSE: "I would rather talk about cats {",
    OBEDIENT: '{"grades": [3], "drop": "all"}',
    SHORT: '{"grades": []}',
}


def grade_of(query: str, passage: str) -> int:
    """Return the grade of a passage, 0 to 3; most are low."""
    return (0, 0, 1, 1, 0, 2, 0, 3)[hashlib.blake2b(f"{query}\0{passage}".encode(), digest_size=1).digest()[0] % 8]


class ChatEndpoint(ThreadingHTTPServer):
    """The server.

    Args:
        fault: called with the content of a question and the number of earlier requests for it; returns a fault or None.
        key: the key that it accepts; None: it asks for none.
        seconds: duration of each good answer.
    """

    daemon_threads = True

    def __init__(self, fault: Callable[[Any, int], str | None], key: str | None, seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault, self.key, self.seconds = fault, key, seconds
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()  # by their body
        self.answered: Counter[str] = Counter()  # good answers that were sent completely, by the request's body
        self.arrivals: list[tuple[float, str | None]] = []  # time and fault of each request
        self.headers_seen: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.under_way = self.most_under_way = 0

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatEndpoint

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        text, server = json.dumps(body, sort_keys=True), self.server
        content = json.loads(body["messages"][-1]["content"])
        with server.lock:
            fault = server.fault(content, server.requests[text])
            server.requests[text] += 1
            server.arrivals.append((time.monotonic(), fault))
            server.headers_seen.append(dict(self.headers))
            server.bodies.append(body)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            self._respond(body, content, fault, text)
        except OSError:
            pass  # the client has given up
        finally:
            with server.lock:
                server.under_way -= 1

    def _respond(self, body: dict[str, Any], content: Any, fault: str | None, text: str) -> None:
        if self.path != "/v1/chat/completions":
            return self._send(404, {"error": {"message": "no such path"}})
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            return self._send(401, {"error": {"message": f"wrong key: {self.headers.get('Authorization')}"}})
        if body["model"] != MODEL:
            return self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        if fault == LIMITED:
            return self._send(429, {"error": {"message": "too many requests"}}, {"Retry-After": "1"})
        if fault == ERROR:
            return self._send(500, {"error": "out of memory"})
        if fault and fault.isdigit():
            return self._send(int(fault), {"error": "refused"}, {"Location": "/elsewhere", "Retry-After": "86400"})
        if fault == SLOW:
            time.sleep(SLOW_SECONDS)
        time.sleep(self.server.seconds)
        passages = content.get("passages", [])
        answer = json.dumps({"grades": [grade_of(content["query"], each) for each in passages]})
        reason = "length" if fault == CUT_OFF else "stop"
        answer = answer[: len(answer) // 2] if fault == CUT_OFF else TEXTS.get(fault or "", answer)
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": reason}
        self._send(200, {"object": "chat.completion", "choices": [choice]}, cut=fault in (BROKEN, DROPPED), fault=fault)
        if fault is None:
            with self.server.lock:
                self.server.answered[text] += 1

    def _send(
        self,
        status: int,
        value: Any,
        headers: dict[str, str] | None = None,
        cut: bool = False,
        fault: str | None = None,
    ) -> None:
        content = json.dumps(value).encode()
        part = content[: len(content) // 2] if cut else content
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        # a dropped connection has promised the whole; broken JSON is all that there is
        self.send_header("Content-Length", str(len(content if fault == DROPPED else part)))
        self.end_headers()
        self.wfile.write(part)


@contextmanager
def chat_endpoint(
    fault: Callable[[Any, int], str | None] = lambda content, earlier: None,
    key: str | None = None,
    seconds: float = 0.0,
) -> Iterator[ChatEndpoint]:
    """Run an endpoint; see ChatEndpoint."""
    with ChatEndpoint(fault, key, seconds) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
