"""Tests `ftjax export --push-to-hub` from a separate process, with a stand-in for the Hub."""

import pytest
from hub_server import PATIENCE, Hub, Repository, serving

FILES = {
    "adapter_config.json": b'{"r": 8}',
    "README.md": b"---\nlibrary_name: peft\n---\n\n# card\n",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 400,
    "model-00002-of-00002.safetensors": bytes(reversed(range(256))) * 300,
    "empty.txt": b"",
    "checkpoint/notes.json": b"{}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("out") / "tuned model"
    for name, data in FILES.items():
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return place


@pytest.fixture
def hub():
    with serving() as hub:
        yield hub


CODE = """
from pathlib import Path
from ftjax.errors import UserError
from ftjax.hub.push import push_folder
try:
    print(push_folder(Path({folder!r}), {repo!r}{settings}))
except UserError as error:
    print("UserError:", error)
"""


def start(hub: Hub, folder, home, repo="me/tuned", settings="", **environment):
    return hub.run(CODE.format(folder=str(folder), repo=repo, settings=settings), home, **environment)


def push(hub: Hub, folder, home, repo="me/tuned", settings="", **environment) -> str:
    """Return what the process prints; any error but UserError fails the test."""
    output, errors = (process := start(hub, folder, home, repo, settings, **environment)).communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output.strip()


def test_every_byte_arrives_in_a_private_repository(hub, folder, tmp_path):
    assert push(hub, folder, tmp_path) == f"{hub.endpoint}/me/tuned"
    assert hub.repositories["me/tuned"].private is True
    assert hub.repositories["me/tuned"].files == FILES
    assert len(hub.uploads) == 2


def test_public_where_it_is_asked(hub, folder, tmp_path):
    push(hub, folder, tmp_path, settings=", private=False")
    assert hub.repositories["me/tuned"].private is False
    assert hub.repositories["me/tuned"].files == FILES


def test_a_bare_name_is_the_users_own(hub, folder, tmp_path):
    assert push(hub, folder, tmp_path, repo="tuned") == f"{hub.endpoint}/me/tuned"
    assert hub.repositories["me/tuned"].files == FILES


def test_a_private_push_does_not_fill_a_public_repository(hub, folder, tmp_path):
    hub.repositories["me/tuned"] = Repository(private=False)
    assert "me/tuned: this repository exists and is public" in push(hub, folder, tmp_path)
    assert not hub.repositories["me/tuned"].files and not hub.uploads


def test_a_second_push_replaces_the_files(hub, folder, tmp_path):
    hub.repositories["me/tuned"] = Repository(private=True, files={"README.md": b"old", "kept.txt": b"kept"})
    push(hub, folder, tmp_path)
    assert hub.repositories["me/tuned"].files == {**FILES, "kept.txt": b"kept"}


def test_an_interrupted_push_is_taken_up_again(hub, folder, tmp_path):
    """A push killed during the second file does not send the first again."""
    hub.hang_after = 1
    process = start(hub, folder, tmp_path)
    assert hub.hanging.wait(PATIENCE)
    process.kill()
    process.communicate()
    assert not hub.repositories["me/tuned"].files and len(hub.uploads) == 1
    hub.hang_after = None
    assert push(hub, folder, tmp_path) == f"{hub.endpoint}/me/tuned"
    assert hub.repositories["me/tuned"].files == FILES
    assert len(hub.uploads) == len(set(hub.uploads)) == 2


def retry(folder, repo="me/tuned") -> str:
    return f"hf upload {repo} '{folder}' . --private"


def test_without_a_token_nothing_is_asked(hub, folder, tmp_path):
    said = push(hub, folder, tmp_path, HF_TOKEN="")
    assert "UserError: me/tuned: not pushed: no Hugging Face token was found. Run `hf auth login`" in said
    assert f"{folder} is complete on this machine" in said and retry(folder) in said
    assert not hub.requests


def test_a_token_that_is_not_valid(hub, folder, tmp_path):
    said = push(hub, folder, tmp_path, HF_TOKEN="hf_other")
    assert "the Hub answered 401" in said and "the token is not valid" in said and retry(folder) in said


def test_somebody_elses_place(hub, folder, tmp_path):
    said = push(hub, folder, tmp_path, repo="others/tuned")
    assert "the Hub answered 403" in said and "role `write`" in said and retry(folder, "others/tuned") in said


def test_the_hub_cannot_be_reached(hub, folder, tmp_path):
    said = push(hub, folder, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "not pushed: the upload broke off" in said and "Connection refused" in said and retry(folder) in said


def test_offline(hub, folder, tmp_path):
    assert "HF_HUB_OFFLINE is set" in push(hub, folder, tmp_path, HF_HUB_OFFLINE="1")


def test_a_name_that_cannot_be(hub, folder, tmp_path):
    assert "UserError: a b/c: not pushed" in push(hub, folder, tmp_path, repo="a b/c")


def test_nothing_to_push(hub, tmp_path):
    empty = tmp_path / "empty"
    assert "expected a folder with files to push; found none" in push(hub, empty, tmp_path)
    empty.mkdir()
    assert "found an empty one" in push(hub, empty, tmp_path)
