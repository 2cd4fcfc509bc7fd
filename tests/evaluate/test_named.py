"""Tests everything that can name a model, in every command: runs, `final/`, `best/`, adapter folders, configurations."""

import json
import shutil
from pathlib import Path

import pytest
from verbs import chat, generate

from ftjax.errors import UserError
from ftjax.evaluate.target import find_target
from ftjax.generate.named import LoadOptions, find_named
from ftjax.generate.session import Generator
from ftjax.hub.adapter.combine import merge_adapters, parse
from ftjax.hub.export import export
from ftjax.hub.run_folder import adapter_folder
from ftjax.hub.same_model import model_digest

PROMPT, SETTINGS = "abc:", {"max_new_tokens": 3, "dtype": "float32"}
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def alone(run, tmp_path):
    """Copy the adapter's folder without the run around it."""
    shutil.copytree(run / "final", tmp_path / "adapter")
    return tmp_path / "adapter"


def test_generate_takes_what_evaluate_takes(run, tiny, alone, capsys):
    want = Generator(str(tiny), run / "final", dtype="float32").generate([PROMPT], max_new_tokens=3)[0].text
    base = Generator(str(tiny), dtype="float32").generate([PROMPT], max_new_tokens=3)[0].text
    assert want != base
    for given in (run, run / "final", run / "best", run / "config.yaml", alone):
        generate(str(given), prompt=[PROMPT], **SETTINGS)
        assert capsys.readouterr().out == want + "\n", given
    generate(str(tiny), prompt=[PROMPT], adapter=run, **SETTINGS)  # and a run for its adapter
    assert capsys.readouterr().out == want + "\n"


def test_chat_takes_a_run(run, tiny, monkeypatch, capsys):
    lines = iter([PROMPT, "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    chat(str(run), chat_template=CHAT, **SETTINGS)
    ours = Generator(str(tiny), run / "final", dtype="float32", chat_template=CHAT)
    assert capsys.readouterr().out == ours.generate([PROMPT], max_new_tokens=3)[0].text + "\n"


def test_a_run_is_asked_as_it_was_trained(changed, capsys):
    """The run's settings hold (no chat template, its tokens, its quantization) unless the command overrides them."""
    folder = changed(data={"prompt_format": "raw"}, model={"quantization": "int8", "tokenizer": "gone", "chat_template": CHAT})
    (folder / "final" / "chat_template.jinja").write_text("{% for m in messages %}aaaaaa{{ m.content }}{% endfor %}")
    generate(str(folder), prompt=[PROMPT], as_json=True, **SETTINGS)
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 1 + len(PROMPT)  # and BOS
    nothing = dict.fromkeys(("revision", "tokenizer", "chat_template"))
    trained = {"special_tokens_in_text": "split", "fold_system": True}
    assert find_named(str(folder)).options() == {**nothing, **trained, "quantization": "int8"}  # its own tokenizer
    assert find_named(str(folder), ["model.chat_template=x{{ 1 }}"]).options()["chat_template"] == "x{{ 1 }}"
    asked = {"revision": "r", "tokenizer": "t", "chat_template": "c", "quantization": "nf4", "special_tokens_in_text": "error"}
    assert find_named(str(folder)).options(LoadOptions(**asked)) == {**asked, "fold_system": True}
    assert find_named(str(folder)).options(LoadOptions(quantization="none"))["quantization"] is None
    (folder / "final" / "tokenizer_config.json").unlink()
    assert find_named(str(folder)).options()["tokenizer"] == "gone"


def test_a_folder_publishes_no_place_and_finds_its_base(alone, tiny, tmp_path, monkeypatch):
    """adapter_config.json has only the base's name; its path is kept on this machine, under a digest of the weights."""
    path = alone / "adapter_config.json"
    assert json.loads(path.read_text())["base_model_name_or_path"] == tiny.name
    published = [file.read_text() for file in alone.iterdir() if file.suffix in (".json", ".md", ".jinja")]
    assert published and not [text for text in published if str(tiny.parent) in text]
    monkeypatch.chdir(tmp_path)
    assert model_digest(Path(find_named(str(alone)).model)) == model_digest(tiny)  # other tests make the same weights
    export(alone, tmp_path / "portable", portable=True)
    export(tmp_path / "portable", tmp_path / "merged", merge=True)
    assert model_digest(Path(find_named(str(tmp_path / "portable")).model)) == model_digest(tiny)
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "of another machine"))
    with pytest.raises(UserError, match=f"names the base model {tiny.name}, .*as --adapter"):
        find_named(str(alone))


def test_a_base_that_is_not_here_is_said(alone, tmp_path):
    path = alone / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "base_model_name_or_path": str(tmp_path / "gone" / "llama")}))
    with pytest.raises(UserError, match=r"adapter_config.json names the base model .*gone/llama, .*as --adapter"):
        generate(str(alone), prompt=[PROMPT])
    path.write_text(json.dumps({**saved, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base model"):
        find_target(str(alone))


def test_what_cannot_be_meant(run, tiny, alone, changed, tmp_path):
    with pytest.raises(UserError, match="this is an adapter, and --adapter"):
        find_named(str(run), adapter=alone)
    folder = changed()
    shutil.rmtree(folder / "final")
    with pytest.raises(UserError, match=r"no final/ yet; take .*best"):
        generate(str(folder), prompt=[PROMPT])
    shutil.rmtree(folder / "best")
    with pytest.raises(UserError, match="train it to its end first"):
        generate(str(folder), prompt=[PROMPT])
    shutil.copytree(tiny, folder / "final")  # a run of full fine-tuning
    assert find_named(str(folder)).model == str(folder / "final")
    with pytest.raises(UserError, match="a whole model, not an adapter"):
        adapter_folder(folder)


def test_merge_adapters_takes_runs(run, tmp_path):
    for name, given in (("runs", run), ("folders", run / "final")):
        merge_adapters(parse([f"{given}=0.5", f"{given}=0.25"]), tmp_path / name)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("runs", "folders"))
    assert one == other
