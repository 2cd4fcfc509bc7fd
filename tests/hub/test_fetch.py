"""Tests where a model's files are found, and the messages if they are not."""

from pathlib import Path

import pytest
from hub_server import PATIENCE, Hub, Repository, serving

from ftjax.errors import UserError
from ftjax.hub.fetch import resolve_model, resolve_tokenizer

CODE = """
from ftjax.errors import UserError
from ftjax.hub.fetch import resolve_model, resolve_tokenizer
try:
    print({call})
except UserError as error:
    print("UserError:", error)
"""

MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": b"spm",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"---\nlicense: mit\n---\n",
}
OTHER_RUNTIMES = {
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"again",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "original/params.json": b"{}",
    "modeling_llama.py": b"raise SystemExit('remote code was run')",
}


@pytest.fixture
def hub():
    with serving() as hub:
        hub.repositories["org/model"] = Repository(files=MODEL | OTHER_RUNTIMES)
        yield hub


def ask(hub: Hub, home, call: str, **environment) -> str:
    output, errors = (process := hub.run(CODE.format(call=call), home, **environment)).communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output.strip()


def found(folder: str) -> dict[str, bytes]:
    place = Path(folder)
    return {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}


# On this machine


def test_a_folder_and_a_gguf_file_are_what_they_are(tmp_path):
    for name, data in MODEL.items():
        (tmp_path / name).write_bytes(data)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(file)) == resolve_tokenizer(str(file)) == file


@pytest.mark.parametrize(
    "path", ["{}/nothing", "./nothing", "a/b/c", "nothing.gguf", "~/nothing", "with space", "here/nothing"]
)
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(tmp_path, monkeypatch, path):
    import huggingface_hub

    def never(*arguments, **settings):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match="no such file or folder") as error:
        resolve_model(path.format(tmp_path))
    assert ("write https://huggingface.co/here/nothing" in str(error.value)) == (path == "here/nothing")


def test_a_folder_without_weights(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"here: expected model\.safetensors .*; found config\.json"):
        resolve_model("here")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "tf_model.h5"])
def test_pickled_weights_are_refused(tmp_path, name):
    (tmp_path / "config.json").touch()
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=rf"only in {name}, a format that can run code.*save_pretrained"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(str(tmp_path)) == tmp_path


def test_other_folders_and_files_are_told_apart(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UserError, match=r"this is an adapter, not a model.*adapter_path"):
        resolve_model(str(tmp_path))
    (tmp_path / "adapter_config.json").rename(tmp_path / "x.gguf")
    with pytest.raises(UserError, match=r"it holds GGUF files \(x\.gguf\); give the file itself"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=f"Give the folder that holds config.json: {tmp_path}"):
        resolve_model(str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=r"model\.revision is of Hub ids only"):
        resolve_model(str(tmp_path), "main")


def test_an_adapter_with_weights_is_no_model(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="this is an adapter, not a model"):
        resolve_model(str(tmp_path))


# From the Hub


def test_only_what_is_needed_is_downloaded(hub, tmp_path):
    assert found(ask(hub, tmp_path, "resolve_model('org/model')")) == MODEL
    assert sorted(hub.downloads) == sorted(MODEL)


def test_a_tokenizer_comes_without_the_weights(hub, tmp_path):
    names = found(ask(hub, tmp_path, "resolve_tokenizer('org/model')"))
    assert set(names) == {name for name in MODEL if not name.endswith(".safetensors")}


def test_the_second_time_nothing_is_downloaded_and_the_hub_may_be_away(hub, tmp_path):
    first = ask(hub, tmp_path, "resolve_model('https://huggingface.co/org/model')")
    hub.downloads.clear()
    assert ask(hub, tmp_path, "resolve_model('org/model')") == first
    assert ask(hub, tmp_path, "resolve_model('org/model')", HF_HUB_OFFLINE="1") == first
    assert ask(hub, tmp_path, "resolve_model('org/model')", HF_ENDPOINT="http://127.0.0.1:9") == first
    assert not hub.downloads


def test_not_there(hub, tmp_path):
    said = ask(hub, tmp_path, "resolve_model('org/nothing')")
    assert "UserError: org/nothing: neither a local folder nor a repository that the Hub shows you" in said


def test_no_such_revision(hub, tmp_path):
    said = ask(hub, tmp_path, "resolve_model('org/model', 'v2')")
    assert "UserError: org/model: the repository has no branch, tag or commit 'v2'" in said


def test_gated(hub, tmp_path):
    hub.repositories["org/gated"] = Repository(gated=True)
    said = ask(hub, tmp_path, "resolve_model('org/gated')")
    assert "UserError: org/gated: the Hub gives it to those who accept its terms" in said and "hf auth login" in said


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_away(hub, tmp_path, environment):
    said = ask(hub, tmp_path, "resolve_model('org/model')", **environment)
    why = "HF_HUB_OFFLINE is set" if "HF_HUB_OFFLINE" in environment else "the Hub cannot be reached"
    assert f"UserError: org/model: no such local folder, {why}" in said
    assert "hf download org/model --local-dir FOLDER" in said


def test_a_repository_of_pickles_or_gguf_files(hub, tmp_path):
    hub.repositories["org/old"] = Repository(files={"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    hub.repositories["org/quantised"] = Repository(files={"config.json": b"{}", "model.Q4_K_M.gguf": b"GGUF"})
    assert "only in pytorch_model.bin, a format that can run code" in ask(hub, tmp_path, "resolve_model('org/old')")
    said = ask(hub, tmp_path, "resolve_model('org/quantised')")
    assert "`hf download org/quantised model.Q4_K_M.gguf`" in said
    assert hub.downloads == ["config.json", "config.json"]
