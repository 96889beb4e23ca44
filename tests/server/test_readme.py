"""What README tells users to put into their clients works: the SDKs' lines are run, and what the agents would ask is
asked at the addresses in their files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import yaml

from k2lite.server.service import Service
from tests.server.tools import TOOL, UNITS

README = Path(__file__).resolve().parents[2] / "README.md"
LOCAL = "http://localhost:8000"


def block(language: str, holds: str) -> str:
    """The one code block of README's serve section in a language that holds a text."""
    section = README.read_text("utf-8").partition("\n## Serving\n")[2].partition("\n## ")[0]
    [found] = [text for text in re.findall(rf"```{language}\n(.*?)```", section, re.S) if holds in text]
    return str(found)


def asked(base: str, model: str, address: str, **more: Any) -> dict[str, Any]:
    """A chat completion at a base address from README, on the test's server."""
    assert base.startswith(LOCAL)
    url = base.replace(LOCAL, address)
    assert httpx.get(f"{url}/models", headers={"Authorization": "Bearer any"}).json()["data"]
    body = {"model": model, "messages": UNITS, "temperature": 0, **more}
    reply = httpx.post(f"{url}/chat/completions", json=body, headers={"Authorization": "Bearer any"}, timeout=60)
    assert reply.status_code == 200, reply.text
    return dict(reply.json()["choices"][0]["message"])


def test_the_sdks_lines_run(demo_server: tuple[str, Service]) -> None:
    code = block("python", "anthropic.Anthropic").replace(LOCAL, demo_server[0])
    exec(compile(code, "README.md", "exec"), {"openai": openai, "anthropic": anthropic})


def test_continue(demo_server: tuple[str, Service]) -> None:
    [model] = yaml.safe_load(block("yaml", "apiBase"))["models"]
    assert model["provider"] == "openai"
    assert asked(model["apiBase"], model["model"], demo_server[0], max_tokens=20)["content"] == "1200 centimeters."


def test_cline(demo_server: tuple[str, Service]) -> None:
    line = next(line for line in README.read_text("utf-8").splitlines() if line.startswith("Cline: "))
    base, _, model = re.findall("`([^`]*)`", line)
    assert asked(base, model, demo_server[0], max_tokens=20, tools=[TOOL])["role"] == "assistant"


def test_kimi_cli(demo_server: tuple[str, Service]) -> None:
    settings = tomllib.loads(block("toml", "providers"))
    model = settings["models"][settings["default_model"]]
    provider = settings["providers"][model["provider"]]
    more = {"max_completion_tokens": 20, "thinking": {"type": "enabled"}, "prompt_cache_key": "x"}
    assert asked(provider["base_url"], model["model"], demo_server[0], **more)["content"] == "1200 centimeters."


def test_claude_code(demo_server: tuple[str, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(re.findall(r"^export (\w+)=(\S+)$", block("sh", "ANTHROPIC"), re.M))
    for name, value in settings.items():
        monkeypatch.setenv(name, value.replace(LOCAL, demo_server[0]))
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with anthropic.Anthropic(max_retries=0) as client:
        answer = client.beta.messages.create(
            model=settings["ANTHROPIC_MODEL"],
            max_tokens=20,
            system=[{"type": "text", "text": "x-anthropic-billing-header: cch=12345;"}],
            messages=[{"role": "user", "content": "How many centimeters are 12 meters?"}],
        )
    assert answer.content
