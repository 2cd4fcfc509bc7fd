"""A server in this process, with a small model of random weights, and OpenAI's own client in front of it."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from openai import OpenAI
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ftjax.generate.paged import PagedBatch, Room
from ftjax.generate.scheduler import Scheduler
from ftjax.generate.session import Generator
from ftjax.serve.adapters import Adapters
from ftjax.serve.app import make_app
from ftjax.serve.schedule import EngineThread
from ftjax.serve.served import Served
from ftjax.serve.server import DrainingServer

# A template with reasoning and tools, in the form of Qwen's.
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% if enable_thinking %}<think>{% elif quiet %}<think></think>{% endif %}{% endif %}"
)
PLAIN = {
    "all": LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    "some": LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 6}, use_rslora=True,
        init_lora_weights=False, task_type="CAUSAL_LM",
    ),
    "layer": LoraConfig(
        r=3, lora_alpha=24, target_modules=["v_proj", "up_proj"], layers_to_transform=[1], init_lora_weights=False,
        task_type="CAUSAL_LM",
    ),
}  # fmt: skip
OTHERS = {
    "dora": (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"), "it is DoRA"),
    "ia3": (IA3Config(task_type="CAUSAL_LM"), "it is ia3"),
    "norms": (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"), "it trained"),
    "large": (
        LoraConfig(r=9, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "its rank is 9, and the server has room for 8",
    ),
}
ROOM = Room(rows=4, context=384, pages=60, page=16, chunk=64, steps=4)


@pytest.fixture(scope="session")
def chatty(untrained, tmp_path_factory) -> Path:
    """The untrained model with a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    shutil.copytree(untrained, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def folders(chatty, tmp_path_factory) -> Path:
    """A folder with an adapter of each kind, written by PEFT."""
    root = tmp_path_factory.mktemp("adapters")
    for number, (name, config) in enumerate({**PLAIN, **{name: one for name, (one, _) in OTHERS.items()}}.items()):
        torch.manual_seed(number)
        get_peft_model(AutoModelForCausalLM.from_pretrained(chatty), config).save_pretrained(root / name)
    return root


@dataclass
class Running:
    """A server that runs, with clients of it."""

    url: str
    generator: Generator
    engine: EngineThread
    served: Served
    server: Any
    adapters: Adapters | None
    clients: list[OpenAI] = field(default_factory=list)

    def client(self, **options) -> OpenAI:
        made = OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 300, **options})
        self.clients.append(made)
        return made


@contextmanager
def running(
    generator: Generator, batch: PagedBatch, *, limit: int = 64, keys: Sequence[str] = (),
    adapters: Callable[[Served], Adapters] | None = None,
) -> Iterator[Running]:  # fmt: skip
    engine = EngineThread(Scheduler(batch), limit)
    served = Served(generator, engine, "tiny")
    loaded = adapters and adapters(served)
    app = make_app(served, engine, keys=keys, adapters=loaded)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off", access_log=False)
    server = DrainingServer(config, engine)
    engine.start()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    found = Running(f"http://127.0.0.1:{port}", generator, engine, served, server, loaded)
    try:
        yield found
    finally:
        for client in found.clients:
            client.close()
        server.should_exit = server.force_exit = True
        thread.join()
        engine.stop()


@pytest.fixture(scope="session")
def generator(chatty) -> Generator:
    return Generator(str(chatty), dtype="float32")


@pytest.fixture(scope="session")
def batch(generator) -> PagedBatch:
    found = PagedBatch(generator.engine, generator.params, ROOM)
    found.warm_up()
    return found


@pytest.fixture(scope="module")
def server(generator, batch) -> Iterator[Running]:
    with running(generator, batch) as found:
        yield found


@pytest.fixture(scope="module")
def client(server) -> OpenAI:
    return server.client()
