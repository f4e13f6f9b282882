"""An OpenAI-compatible endpoint on a thread of the test: says what it is told to, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

REFUSAL = "I'm sorry, but I can't help with that request."
HELPFUL = "Here is a long and helpful answer to your question with quite enough words in it to count as one."


class Said(NamedTuple):
    """One answer of the server."""

    payload: Any
    """Sent as JSON; bytes as they are."""
    status: int = 200
    headers: dict[str, str] = {}
    wait: float = 0.0


def completion(text: str | None, *, reason: str | None = "stop", usage: bool = True, **message: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}
        ],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    return body


class Endpoint:
    """A running server."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Said | dict[str, Any]]) -> None:
        self.answer = answer
        self.models: Said | None = Said({"object": "list", "data": [{"id": "tiny"}, {"id": "other/model"}]})
        self.asked: list[dict[str, Any]] = []
        self.authorization: list[str | None] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def name(self, model: str = "tiny") -> str:
        return f"{self.url}#{model}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                endpoint.authorization.append(self.headers.get("Authorization"))
                self._say(endpoint.models or Said({"error": "no such page"}, 404))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    endpoint.authorization.append(self.headers.get("Authorization"))
                    endpoint.asked.append({**body, "path": self.path})
                    number = len(endpoint.asked)
                    endpoint.under_way += 1
                    endpoint.most_under_way = max(endpoint.most_under_way, endpoint.under_way)
                try:
                    said = endpoint.answer(body, number)
                    said = said if isinstance(said, Said) else Said(said)
                    threading.Event().wait(said.wait)
                finally:
                    with endpoint.lock:
                        endpoint.under_way -= 1
                self._say(said)

            def _say(self, said: Said) -> None:
                data = said.payload if isinstance(said.payload, bytes) else json.dumps(said.payload).encode()
                try:
                    self.send_response(said.status)
                    for key, value in said.headers.items():
                        self.send_header(key, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True  # the client gave up

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Said | dict[str, Any]]) -> Iterator[Endpoint]:
    endpoint = Endpoint(answer)
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
        thread.join()


def polite(body: dict[str, Any], number: int) -> dict[str, Any]:
    """Refuses what the embedded harmful set asks every other time."""
    return completion(REFUSAL if number % 2 else HELPFUL)
