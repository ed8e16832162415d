"""ba_lora/hub.py: without a network the hub is asked once, and models and data sets end in one line each."""

import subprocess
import sys
import textwrap
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants

from ba_lora import hub
from ba_lora.errors import UserError
from ba_lora.models.source import hub_errors


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    """A process that may ask the hub; `online(answer)` sets what a request ends in."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.hub_obstacle.cache_clear()
    calls = []

    class Session:
        def head(self, url: str, **settings: object) -> httpx2.Response:
            calls.append(url)
            if isinstance(Session.answer, Exception):
                raise Session.answer
            return httpx2.Response(Session.answer)

    def ask(answer: object) -> list[str]:
        Session.answer = answer
        monkeypatch.setattr("huggingface_hub.get_session", Session)
        return calls

    yield ask
    hub.hub_obstacle.cache_clear()


@pytest.mark.parametrize("answer", [httpx2.ConnectError("no route"), httpx2.ConnectTimeout("slow"), 503])
def test_without_a_network_the_cache_is_used_from_then_on(online, answer: object) -> None:  # noqa: ANN001
    calls = online(answer)
    assert "cannot be reached" in hub.hub_obstacle()
    assert constants.is_offline_mode()
    with pytest.raises(UserError, match="meta-llama/Llama-2-7b-hf.*cannot be reached") as error:
        with hub_errors("meta-llama/Llama-2-7b-hf", "model"):
            raise OSError("We couldn't connect\nto the hub")
    assert "\n" not in str(error.value)
    assert len(calls) == 1


@pytest.mark.parametrize("answer", [200, 403])
def test_a_hub_that_answers_is_asked(online, answer: int) -> None:  # noqa: ANN001
    online(answer)
    assert hub.hub_obstacle() is None and not constants.is_offline_mode()


def test_folders_never_ask(online, tmp_path: Path) -> None:  # noqa: ANN001
    calls = online(httpx2.ConnectError("no route"))
    with hub_errors(str(tmp_path), "model"):
        pass
    assert calls == []


def test_a_gated_base_and_a_data_set_without_network_are_a_line_each(root: Path, tmp_path: Path) -> None:
    """Nothing listens on the discard port of this machine: what a request meets where there is no network."""
    program = """
        from ba_lora.config.schema import ModelConfig
        from ba_lora.errors import UserError
        from ba_lora.models.load import load_model
        from ba_lora.rows import load_rows
        base = ModelConfig(name="meta-llama/Llama-2-7b-hf")
        for ask in (lambda: load_model(base), lambda: load_rows("openai/gsm8k")):
            try:
                ask()
            except UserError as error:
                print(error)
    """
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment | {"HOME": str(tmp_path), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("http://127.0.0.1:9 cannot be reached" in line for line in lines), done
    assert "Retrying" not in done.stderr
