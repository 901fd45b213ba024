"""A tiny model that knows tools, and a server of it; files that need another define their own."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from support.chat_models import write_tool_model
from support.serving import serving

from kvp_mlx.bundle.loading import KVPModel, load_any
from kvp_mlx.serve.service import Service


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tool_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def twin(directory: Path) -> KVPModel:
    """The same model for this thread, to know what has to come out."""
    return load_any(str(directory))


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[tuple[str, Service]]:
    with serving(directory) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: tuple[str, Service]) -> Iterator[openai.OpenAI]:
    """The openai package's; files of other APIs define their own."""
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client
