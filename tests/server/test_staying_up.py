"""What must not bring the server down or keep a slot: clients that leave, full queues, wrong keys, odd bodies, engines
that fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
import torch

from k2lite.engine import Engine
from k2lite.quant.errors import CheckpointError
from k2lite.server.service import Limits, Service
from tests.server.conftest import served
from tests.server.tools import TOOL, UNITS

LONG = {"model": "kimi", "messages": UNITS, "max_tokens": 1500, "temperature": 0.0, "stream": True, "logit_bias": {}}


def soon(what: Callable[[], bool]) -> bool:
    """Whether it comes true within a generous while."""
    for _ in range(600):
        if what():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def endless(random_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token ends an answer: the random model would choose one by chance, before the test has looked."""
    monkeypatch.setattr(random_engine, "stop_ids", frozenset())


@pytest.mark.usefixtures("endless")
def test_a_client_that_leaves_frees_its_slot(random_server: tuple[str, Service]) -> None:
    address, service = random_server
    before = service.scheduler.totals.cancelled
    with httpx.stream("POST", f"{address}/v1/chat/completions", json={**LONG, "tools": [TOOL]}) as reply:
        next(reply.iter_lines())
        assert soon(lambda: service.scheduler.running == 1)
    assert soon(lambda: service.scheduler.running == 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/chat/completions", json={**LONG, "stream": False}, timeout=0.5)
    assert soon(lambda: service.scheduler.running == 0)
    assert soon(lambda: service.scheduler.totals.cancelled == before + 2)


@pytest.mark.usefixtures("endless")
def test_a_full_queue_is_a_429_that_says_when(random_engine: Engine) -> None:
    with served(random_engine, limits=Limits(slots=1, queue=1)) as (address, service):
        url = f"{address}/v1/chat/completions"
        with httpx.stream("POST", url, json=LONG), httpx.stream("POST", url, json=LONG):
            assert soon(lambda: (service.scheduler.running, service.scheduler.waiting) == (1, 1))
            reply = httpx.post(url, json=LONG)
            assert reply.status_code == 429
            assert int(reply.headers["Retry-After"]) >= 1
            claude = httpx.post(f"{address}/v1/messages", json=LONG)
            assert claude.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.usefixtures("endless")
def test_neighbours_do_not_change_an_answer(random_server: tuple[str, Service]) -> None:
    address, _ = random_server
    body = {**LONG, "stream": False, "max_tokens": 12, "seed": 7}
    url = f"{address}/v1/chat/completions"
    alone = httpx.post(url, json=body, timeout=60).json()["choices"][0]["message"]
    with httpx.stream("POST", url, json=LONG, timeout=60) as neighbour:
        lines = neighbour.iter_lines()
        next(lines)
        together = httpx.post(url, json=body, timeout=60).json()["choices"][0]["message"]
    assert together == alone


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("trouble", ["drive", "NaN"])
def test_a_request_the_engine_fails_at_fails_alone(
    random_engine: Engine, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    real = Engine.step

    def step(self: Engine, chunks: Any) -> Any:
        bad = [chunk.ids[0] == 65 and not chunk.sequence.ids for chunk in chunks]
        if trouble == "drive" and any(bad):
            raise CheckpointError("/secret/path/model-1.safetensors: can't be read: Input/output error")
        return [row * torch.nan if wrong else row for row, wrong in zip(real(self, chunks), bad, strict=True)]

    with served(random_engine) as (address, _):
        url = f"{address}/v1/completions"
        with httpx.stream("POST", url, json={"prompt": [66, 67], "max_tokens": 1500, "stream": True}) as neighbour:
            lines = neighbour.iter_lines()
            next(lines)
            monkeypatch.setattr(Engine, "step", step)
            reply = httpx.post(url, json={"prompt": [65, 66], "max_tokens": 4}, timeout=60)
            assert reply.status_code == 500
            assert "secret" not in reply.text
            assert next(line for line in lines if line).startswith("data: {")
        assert httpx.post(url, json={"prompt": [70], "max_tokens": 2}, timeout=60).status_code == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_scheduler_that_fails_keeps_nobody_waiting(random_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with served(random_engine) as (address, service):
        url = f"{address}/v1/completions"
        monkeypatch.setattr(service.scheduler, "_drop_cancelled", fail)
        for _ in range(2):  # one that waits when it happens, and one that comes later
            assert httpx.post(url, json={"prompt": [66], "max_tokens": 2}, timeout=60).status_code == 500
        assert httpx.get(f"{address}/ready").status_code == 503


def test_a_key_is_wanted_where_there_is_one(random_engine: Engine) -> None:
    with served(random_engine, key="sesame") as (address, _):
        for key, status in (("sesame", 200), ("Sesame", 401), ("", 401), ("sesame2", 401)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == status
        assert httpx.get(f"{address}/v1/models", headers={"x-api-key": "sesame"}).status_code == 200
        assert httpx.get(f"{address}/metrics").status_code == 401
        assert httpx.get(f"{address}/health").status_code == 200
        refused = httpx.post(f"{address}/v1/messages", json={}).json()
        assert refused == {
            "type": "error",
            "error": {"type": "authentication_error", "message": "the API key is missing or wrong"},
        }


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{", 400),
        (b'{"messages": NaN}', 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b"[" * 100_000, 400),
        (b'{"a":' * 500 + b"1" + b"}" * 500, 400),
        (b'{"messages": [{"role": "user", "content": 5}]}', 400),
        (b'{"messages": [[]]}', 400),
        (b"\xff\xfe", 400),
        (b" " * (2 << 20), 413),
    ],
)
def test_an_odd_body_is_refused(random_engine: Engine, body: bytes, status: int) -> None:
    with served(random_engine, limits=Limits(max_body_bytes=1 << 20)) as (address, _):
        for path in ("chat/completions", "completions", "responses", "messages", "messages/count_tokens"):
            reply = httpx.post(f"{address}/v1/{path}", content=body)
            assert reply.status_code == status, path
            assert reply.json()["error"]["message"]


def test_what_is_watched(demo_server: tuple[str, Service], client: openai.OpenAI) -> None:
    client.chat.completions.create(model="kimi", messages=UNITS, max_tokens=2)  # type: ignore[arg-type]
    address, service = demo_server
    text = httpx.get(f"{address}/metrics").text
    values = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert float(values["k2lite_requests_finished_total"]) >= 1
    state = httpx.get(f"{address}/api/state").json()
    assert len(state["counts"]) == len(state["layers"]) == len(service.engine.config.moe_layers)
    assert sum(map(sum, state["counts"])) > 0
    page = httpx.get(f"{address}/")
    assert "<canvas" in page.text
    assert "http" not in page.text.replace("httpx", "")  # no outside host
    assert httpx.get(f"{address}/nowhere").json()["error"]["type"] == "not_found_error"
