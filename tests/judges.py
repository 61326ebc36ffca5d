"""A real HTTP server that plays a judge, for as long as a test lasts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the server sends back; `text` is wrapped into a chat completion unless `body` is given."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.text}}
        return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the server was sent."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][0]["content"])


class JudgeServer:
    """Answers questions as it is told to.

    Attributes:
        url: What an experiment calls it by.
        questions: Every question so far, in the order of arrival.
        answer: Gives the answer to a question; may be replaced while the server runs.
    """

    def __init__(self, answer: Callable[[Question], Answer | str], port: int = 0) -> None:
        self.answer = answer
        self.questions: list[Question] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                question = Question(
                    path=self.path, headers=dict(self.headers), body=json.loads(self.rfile.read(size))
                )
                owner.questions.append(question)
                answer = owner.answer(question)
                answer = Answer(text=answer) if isinstance(answer, str) else answer
                content = answer.content()
                self.send_response(answer.status)
                self.send_header("Content-Length", str(len(content)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                owner.questions.append(Question(path=self.path, headers=dict(self.headers), body={}))
                self.send_response(404)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def serving(answer: Callable[[Question], Answer | str]) -> Iterator[JudgeServer]:
    """A server inside the context."""
    server = JudgeServer(answer)
    server.start()
    try:
        yield server
    finally:
        server.stop()
