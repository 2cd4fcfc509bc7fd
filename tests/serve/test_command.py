"""Tests `ftjax serve` as a process: it starts, answers OpenAI's client, and ends after SIGTERM when its requests have ended."""

import gc
import os
import signal
import socket
import subprocess
import threading
import time

import openai
import pytest
from processes import address, environment, start
from typer.testing import CliRunner

from ftjax.cli import app
from ftjax.serve.command import named_adapters, read_keys, sizes_of


def wait_until_up(process: subprocess.Popen, url: str, key: str) -> openai.OpenAI:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    deadline = time.monotonic() + 300
    while True:
        assert process.poll() is None, process.communicate()[0]
        try:
            client.models.list()
            return client
        except openai.APIConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_server_from_start_to_end(chatty, folders, tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    host, port = address().split(":")
    command = [
        "serve",
        chatty,
        "--port",
        port,
        "--rows",
        2,
        "--context",
        256,
        "--api-key-file",
        tmp_path / "keys",
        "--name",
        "tiny",
    ]
    env = environment(2, JAX_COMPILATION_CACHE_DIR=os.environ["JAX_COMPILATION_CACHE_DIR"])
    command += ["--adapter", f"tuned={folders / 'all'}", "--adapter-root", folders, "--max-rank", 8]
    process = start([*command, "--mesh", "data=2"], env=env)
    try:
        client = wait_until_up(process, f"http://{host}:{port}", "secret")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="x", max_retries=0).models.list()
        client.post("/load_lora_adapter", body={"lora_name": "more", "lora_path": "some"}, cast_to=object)
        assert [model.id for model in client.models.list().data] == ["tiny", "tuned", "more"]
        said = [
            client.completions.create(model=name, prompt="A", max_tokens=9, temperature=0) for name in ("tiny", "tuned", "more")
        ]
        assert len({one.choices[0].text for one in said}) == 3
        asked = {"model": "tuned", "prompt": "Tom", "max_tokens": 200, "temperature": 1, "seed": 1, "logit_bias": {"2": -100}}
        chunks, first = [], threading.Event()

        def read() -> None:
            for chunk in client.completions.create(**asked, stream=True):
                chunks.append(chunk)
                first.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert first.wait(60)
        process.send_signal(signal.SIGTERM)
        reader.join()
        assert chunks[-1].choices[0].finish_reason == "length"
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 0, said
        assert "SIGTERM" in said and "2 rows, 256 tokens of context" in said and "attention: pages are gathered" in said
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--adapter", "a=x", "--adapter", "y"], "give each a name"),
        (["--adapter", "a=nowhere"], "nowhere"),
        (["--adapter-root", "nowhere"], "not a folder"),
        (["--adapter", "a=x", "--adapter", "a=y"], "a name of its own"),
        (["--mesh", "tensor"], "AXIS=SIZE"),
        (["--mesh", "sequence=2"], "sequence"),
        (["--mesh", "data=99"], "99 devices"),
        (["--api-key-file", "nowhere"], "cannot be read"),
        (["--context", "99999"], "the model's context is 512"),
        (["--cache-gb", "0.0001"], "choose a context of at most"),
    ],
    ids=str,
)
def test_what_cannot_be_served(chatty, options, says):
    found = CliRunner().invoke(app, ["serve", str(chatty), "--port", address().rpartition(":")[2], *options])
    assert found.exit_code == 2 and says in " ".join(found.output.split()), found.output


def test_addresses_that_it_cannot_have(chatty):
    """They are refused before a model is loaded, and no socket stays open (pytest fails a test that leaves one behind)."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options in ["--port", port], ["--host", "192.0.2.1"], ["--host", "a..b"], ["--host", "a" * 70]:
            found = CliRunner().invoke(app, ["serve", str(chatty / "nowhere"), *options])
            assert found.exit_code == 2 and "choose another" in " ".join(found.output.split()), found.output
    gc.collect()


def test_options(tmp_path):
    assert named_adapters(["a=x/y", "b=z"])[0] is None and [name for name, _ in named_adapters(["a=x/y", "b=z"])[1]] == [
        "a",
        "b",
    ]
    assert str(named_adapters(["x/y"])[0]) == "x/y" and named_adapters([]) == (None, [])
    assert sizes_of(["tensor=4", "data=2"]) == {"tensor": 4, "data": 2}
    (tmp_path / "keys").write_text("\n one \n\ntwo\n")
    assert read_keys(tmp_path / "keys") == ["one", "two"]
