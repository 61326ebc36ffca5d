"""A question reaches a real server, is asked again where that helps, and never gives the key away."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest

from evomerge.fitness.base import UnavailableError
from evomerge.fitness.chat_client import ChatClient, Reply
from tests.judges import Answer, JudgeServer, Question, serving

CANARY = "sk-canary-6f1d"


def client(
    url: str,
    *,
    key: str | None = None,
    variable: str | None = None,
    max_tokens: int | None = 9,
    timeout: float = 10.0,
    retries: int = 0,
) -> ChatClient:
    return ChatClient(
        url=url,
        model="m",
        key=key,
        variable=variable,
        max_tokens=max_tokens,
        timeout=timeout,
        retries=retries,
    )


def ask(asked: ChatClient, prompt: str = "hello") -> Reply:
    return asked.ask(prompt, threading.Event())


def in_turn(*answers: Answer | str) -> Callable[[Question], Answer | str]:
    """One answer after the other, the last for ever."""
    left = list(answers)
    return lambda _question: left.pop(0) if len(left) > 1 else left[0]


def test_a_question_is_a_chat_completion_at_temperature_0() -> None:
    with serving(in_turn("seven, これは良い")) as server:
        reply = ask(client(server.url, key=CANARY, variable="KEY"), "How good is あ?")
        (question,) = server.questions
    assert reply == Reply(text="seven, これは良い")
    assert question.path == "/v1/chat/completions"
    assert question.headers["Authorization"] == f"Bearer {CANARY}"
    assert question.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "How good is あ?"}],
        "temperature": 0,
        "stream": False,
        "max_tokens": 9,
    }


def test_without_a_key_and_a_limit_none_is_sent() -> None:
    with serving(in_turn("7")) as server:
        ask(client(server.url, max_tokens=None))
        assert "Authorization" not in server.questions[0].headers
        assert "max_tokens" not in server.questions[0].body


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_busy_server_is_asked_again_after_the_time_it_asks_for(status: int) -> None:
    busy = Answer(status=status, headers={"Retry-After": "0"}, body=b"busy")
    with serving(in_turn(busy, busy, "7")) as server:
        assert ask(client(server.url, retries=2)).text == "7"
        assert len(server.questions) == 3
        server.answer = in_turn(busy)
        with pytest.raises(UnavailableError, match=rf"it answers {status} busy \(asked 3 times\)"):
            ask(client(server.url, retries=2))


def test_the_time_to_wait_may_be_a_date_and_ends_with_the_others() -> None:
    """A date half an hour ahead is more than any question waits; one in the past is no wait."""
    late = Answer(status=503, headers={"Retry-After": formatdate(time.time() + 1800, usegmt=True)}, body=b"")
    past = Answer(status=503, headers={"Retry-After": formatdate(time.time() - 60, usegmt=True)}, body=b"")
    with serving(in_turn(past, late, "7")) as server:
        with pytest.raises(UnavailableError, match=r"it answers 503; it asks to wait 1(79\d|800) s"):
            ask(client(server.url, retries=5))
        assert len(server.questions) == 2
    given_up = threading.Event()
    given_up.set()
    with serving(in_turn(Answer(status=503, headers={"Retry-After": "200"}, body=b""))) as server:
        with pytest.raises(UnavailableError, match="given up"):
            client(server.url, retries=5).ask("?", given_up)
        assert len(server.questions) == 1


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    with pytest.raises(
        UnavailableError, match=rf"the judge m at {address} cannot be asked: Connection.*refused"
    ):
        ask(client(f"http://127.0.0.1:{port}/v1"))


@pytest.mark.parametrize("slow_after", ["silence", "a first byte"])
def test_a_slow_reply_is_given_up(slow_after: str) -> None:
    over = threading.Event()

    def answer(question: Question) -> Answer:
        over.wait(10)
        return Answer(text="7")

    with serving(answer) as server:
        if slow_after == "a first byte":
            trickle = _trickling(over)
            url = f"http://127.0.0.1:{trickle}/v1"
        else:
            url = server.url
        try:
            with pytest.raises(UnavailableError, match=r"no reply within 0\.2 s"):
                ask(client(url, timeout=0.2))
        finally:
            over.set()


def _trickling(over: threading.Event) -> int:
    """A server that sends a byte of its reply every now and then; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not over.wait(0.05):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"{}", b'{"choices": []}', b"[1]", b"\xff"])
def test_what_is_no_chat_completion_is_shown(body: bytes) -> None:
    with (
        serving(in_turn(Answer(body=body))) as server,
        pytest.raises(UnavailableError, match="its reply is no chat completion: "),
    ):
        ask(client(server.url))


def test_a_reply_without_text_is_an_empty_one() -> None:
    body = b'{"choices": [{"message": {"role": "assistant", "content": null, "refusal": "no"}}]}'
    with serving(in_turn(Answer(body=body))) as server:
        assert ask(client(server.url)) == Reply(text="")


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_that_the_server_does_not_take_is_one_reply_among_others(status: int) -> None:
    with serving(in_turn(Answer(status=status, body=b"too long"))) as server:
        assert ask(client(server.url, retries=3)) == Reply(refused=f"it answers {status} too long")
        assert len(server.questions) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_rejected_key_names_its_variable_and_stays_secret(status: int) -> None:
    rejected = Answer(status=status, body=f"Incorrect API key provided: {CANARY}".encode())
    with serving(in_turn(rejected)) as server:
        with pytest.raises(UnavailableError, match="environment variable MY_KEY") as caught:
            ask(client(server.url, key=CANARY, variable="MY_KEY", retries=3))
        assert len(server.questions) == 1
        assert CANARY not in str(caught.value)
        assert "Incorrect API key provided: [key]" in str(caught.value)
        with pytest.raises(UnavailableError, match=r"judge\.api_key_env"):
            ask(client(server.url))


def test_a_redirect_is_not_followed_with_the_key() -> None:
    with serving(in_turn("7")) as elsewhere:
        where = f"http://localhost:{elsewhere.port}/v1/chat/completions"
        for status in (301, 302, 303, 307, 308):
            moved = Answer(status=status, headers={"Location": where}, body=b"")
            with (
                serving(in_turn(moved)) as server,
                pytest.raises(UnavailableError, match=f"it redirects to {where}"),
            ):
                ask(client(server.url, key=CANARY, variable="KEY"))
        assert elsewhere.questions == []


def test_the_key_is_in_no_message_whatever_the_server_does() -> None:
    answers: list[Answer] = [
        Answer(status=500, body=CANARY.encode()),
        Answer(status=404, body=f'{{"error": "{CANARY}"}}'.encode()),
        Answer(status=302, headers={"Location": f"http://x/{CANARY}"}, body=b""),
        Answer(body=f"not JSON {CANARY}".encode()),
    ]
    for answer in answers:
        with serving(in_turn(answer)) as server, pytest.raises(UnavailableError) as caught:
            ask(client(server.url, key=CANARY, variable="KEY"))
        assert CANARY not in str(caught.value)
        assert "[key]" in str(caught.value)
    with serving(in_turn(Answer(status=400, body=CANARY.encode()))) as server:
        assert ask(client(server.url, key=CANARY, variable="KEY")).refused == "it answers 400 [key]"


def test_a_server_that_comes_back_is_found_again() -> None:
    with serving(in_turn("1")) as server:
        port = server.port
    found = []

    def come_back() -> None:
        found.append(JudgeServer(in_turn("8"), port))
        found[0].start()

    timer = threading.Timer(0.3, come_back)
    timer.start()
    try:
        assert ask(client(f"http://127.0.0.1:{port}/v1", retries=6)).text == "8"
    finally:
        timer.join()
        found[0].stop()
