"""A server on a free port of this machine, with the demo model and with a random one, and clients for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import anthropic
import openai
import pytest
import uvicorn

import k2lite
from k2lite.demo_checkpoint import DEMO_CONFIG, write_random_demo, write_random_model
from k2lite.demo_folder import DEMO_FOLDER
from k2lite.engine import Engine
from k2lite.quant.formats import FP8_NAME
from k2lite.server.app import Server
from k2lite.server.listening import config, listen
from k2lite.server.prefix_store import PrefixStore
from k2lite.server.service import Limits, Service


@contextmanager
def served(
    engine: Engine, *, limits: Limits | None = None, key: str | None = None, store: PrefixStore | None = None
) -> Iterator[tuple[str, Service]]:
    """The address of a server in a thread of this process, and its service."""
    service = Service(engine, name="kimi", limits=limits, store=store)
    socket = listen("127.0.0.1", 0)
    server = uvicorn.Server(config(Server(service, key=key).app()))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()
        socket.close()


@pytest.fixture(scope="session")
def demo_engine() -> Engine:
    return k2lite.load(DEMO_FOLDER, context=2048)


@pytest.fixture(scope="session")
def random_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("random") / "model"
    write_random_demo(folder)
    return k2lite.load(folder, context=2048)


@pytest.fixture(scope="session")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Where it does not matter what the model says."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = {**DEMO_CONFIG, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
    write_random_model(folder, config, experts=FP8_NAME, trunk=FP8_NAME, seed=0)
    return k2lite.load(folder, context=2048)


@pytest.fixture(scope="session")
def demo_server(demo_engine: Engine) -> Iterator[tuple[str, Service]]:
    with served(demo_engine) as server:
        yield server


@pytest.fixture(scope="session")
def random_server(random_engine: Engine) -> Iterator[tuple[str, Service]]:
    with served(random_engine) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_server(tiny_engine: Engine) -> Iterator[tuple[str, Service]]:
    with served(tiny_engine) as server:
        yield server


@pytest.fixture(scope="session")
def client(demo_server: tuple[str, Service]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=demo_server[0] + "/v1", api_key="any", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def claude(demo_server: tuple[str, Service]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=demo_server[0], api_key="any", max_retries=0) as made:
        yield made
