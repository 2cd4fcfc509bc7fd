"""Tests model cards: front matter that the Hub reads, and the contents."""

import re
from dataclasses import replace

import pytest
import yaml
from gguf_writing import vocabulary
from huggingface_hub import ModelCard

from ftjax.config import Config
from ftjax.hub.card import CardFacts, base_license, installed_versions, model_card, run_card

FACTS = CardFacts(
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    method="lora",
    objective="sft",
    kind="adapter",
    method_settings={"name": "lora", "r": 16, "lora_alpha": 32.0, "rank_pattern": {}, "layers_to_transform": None},
    training={"optimizer": {"learning_rate": 2e-4}},
    data=["train: 1,200 examples, 3 dropped: too long", "validation: 100 examples"],
    metrics={"eval/loss": 1.23456789, "eval/perplexity": 3.4369},
    step=150,
    versions={"ftjax": "0.1.0", "jax": "0.10.2"},
    datasets=["org/data"],
    license="apache-2.0",
)


def test_front_matter_is_what_the_hub_reads():
    card = ModelCard(model_card(FACTS))
    assert card.data.to_dict() == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["org/data"],
        "tags": ["ftjax", "lora", "sft"],
    }


def test_the_text_has_what_was_done():
    text = ModelCard(model_card(FACTS)).text
    assert "a lora adapter for [HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB" in text
    assert "150 optimizer steps" in text
    for line in FACTS.data:
        assert f"- {line}\n" in text
    assert "| eval/loss | 1.235 |" in text and "| eval/perplexity | 3.437 |" in text
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))
    assert settings == {"method": {"name": "lora", "r": 16, "lora_alpha": 32.0}, "optimizer": {"learning_rate": 2e-4}}
    assert 'PeftModel.from_pretrained(model, "THIS_FOLDER")' in text
    assert "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora" in text and "convert_lora_to_gguf.py" in text
    assert "ftjax 0.1.0, jax 0.10.2" in text


def test_python_in_the_card_is_python():
    for kind in ("adapter", "model"):
        for block in re.findall(r"```python\n(.*?)```", model_card(CardFacts("a/b", "lora", "sft", kind)), re.DOTALL):
            compile(block, "README.md", "exec")


def test_a_whole_model():
    card = ModelCard(model_card(CardFacts("org/base", "full", "sft", "model")))
    assert card.data.library_name == "transformers" and card.data.base_model == "org/base"
    assert "convert_hf_to_gguf.py THIS_FOLDER" in card.text and "vllm serve THIS_FOLDER" in card.text
    assert "peft" not in card.text.lower()


@pytest.mark.parametrize("base", ["stories260k", "SmolLM2-135M-Instruct.Q4_1.gguf"])
def test_a_local_base_is_no_hub_id(base):
    card = ModelCard(model_card(CardFacts(base, "lora", "sft", "adapter")))
    assert card.data.base_model is None
    assert f"`BASE_FOLDER` is the Hugging Face folder of `{base}`" in card.text
    assert 'from_pretrained("BASE_FOLDER")' in card.text and f'"{base}"' not in card.text


def test_what_other_tools_would_pass_over_is_said():
    """llama.cpp's converter needs the base's config.json, which a GGUF file lacks; vLLM ignores patterns."""
    wants = "`convert_lora_to_gguf.py`: it wants that folder as `--base`"
    assert wants in model_card(CardFacts("base.Q8_0.gguf", "lora", "sft", "adapter"))
    assert wants not in model_card(CardFacts("base", "lora", "sft", "adapter")) and wants not in model_card(FACTS)
    settings = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    text = model_card(replace(FACTS, method_settings=settings))
    assert "vLLM ignores this adapter's `rank_pattern` and `alpha_pattern` without a word" in text
    assert "ignores" not in model_card(FACTS)


def config(path: str, train: str, **method) -> Config:
    return Config.model_validate(
        {
            "model": {"path": path},
            "method": {"name": "lora", "r": 4, **method},
            "data": {"train": train},
            "output_dir": "/home/somebody/runs/one",
        }
    )


def test_of_a_run():
    text = run_card(
        config("meta-llama/Llama-3.2-1B", "org/data"),
        step=3,
        data=["train: 7 examples"],
        metrics={"eval/loss": 2.0},
        whole=False,
    )
    card = ModelCard(text)
    assert card.data.base_model == "meta-llama/Llama-3.2-1B" and card.data.datasets == ["org/data"]
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))
    assert settings["method"]["r"] == 4 and settings["training"]["seed"] == 42 and settings["data"]["max_length"] == 1024
    assert "3 optimizer steps" in text
    for package, version in installed_versions().items():
        assert f"{package} {version}" in text


def test_no_path_of_this_machine_is_published(tmp_path):
    folder = tmp_path / "my base"
    folder.mkdir()
    file = tmp_path / "train.jsonl"
    file.touch()
    text = run_card(
        config(str(folder), str(file), adapter_path="/home/somebody/adapter"), step=1, data=[], metrics={}, whole=False
    )
    assert str(tmp_path) not in text and "/home/somebody" not in text
    card = ModelCard(text)
    assert card.data.base_model is None and card.data.datasets is None and "`my base`" in card.text


def test_rewards_and_environments_have_names_alone(tmp_path):
    (tmp_path / "schema.json").touch()
    rewards = [
        {"name": f"{tmp_path}/own.py:brevity", "weight": 0.5}, "environment", str(tmp_path),
        {"name": "json_schema", "options": {"schema": f"{tmp_path}/schema.json"}},
        {"name": "judge", "options": {"url": "http://10.0.0.7/v1", "model": "org/judge", "prompt": "{prompt}: {completion}?"}},
    ]  # fmt: skip
    objective = {"name": "grpo", "environment": f"{tmp_path}/game.py:Game", "rewards": rewards}
    values = {"model": {"path": "org/a"}, "data": {"train": "org/b"}, "objective": objective}
    text = run_card(Config.model_validate(values), step=1, data=[], metrics={}, whole=True)
    assert str(tmp_path) not in text and "10.0.0.7" not in text
    found = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))["objective"]
    assert found["environment"] == "game.py:Game"
    assert [one["name"] for one in found["rewards"]] == ["own.py:brevity", "environment", tmp_path.name, "json_schema", "judge"]
    assert found["rewards"][3]["options"] == {"schema": "schema.json"}
    assert found["rewards"][4]["options"] == {"model": "org/judge", "prompt": "{prompt}: {completion}?"}


@pytest.mark.parametrize("given", ["{home}/my data/train.jsonl", "{home}/my data", "~/my data/train.jsonl", "rows/train.jsonl"])
def test_lines_about_the_data_have_names_alone(tmp_path, monkeypatch, given):
    """Paths of broken rows, of contaminated rows and of checkpoints are shortened; Hub ids and counts stay."""
    home = tmp_path / "some home"
    monkeypatch.setenv("HOME", str(home))
    data = {"train": [given.format(home=home), "org/data"], "validation": str(home / "held out" / "val.jsonl")}
    training = {"checkpoint_dir": f"{home}/checkpoints"}
    values = {"model": {"path": f"{home}/base"}, "method": {"name": "lora"}, "data": data, "training": training}
    folder = given.format(home=home).removesuffix("/train.jsonl").replace("~", str(home))
    lines = [
        f"{folder}/train.jsonl, org/data: 1,200 of 1,300 examples kept, 12 tokens/second and 1/2",
        f"warning: 2 broken rows were skipped: {folder}/train.jsonl:41: expected text | {folder}/sub/b.jsonl:7: no JSON",
        f"warning: 3 rows are in {home}/held out/val.jsonl:3 too; see https://huggingface.co/org/data, /var/x/store.bin",
    ]
    text = run_card(Config.model_validate(values), step=1, data=lines, metrics={}, whole=False)
    assert "home" not in text and "/var" not in text and "rows/" not in text and "my data/" not in text
    assert "- train.jsonl, org/data: 1,200 of 1,300 examples kept, 12 tokens/second and 1/2\n" in text
    assert "skipped: train.jsonl:41: expected text | b.jsonl:7: no JSON\n" in text
    assert "in val.jsonl:3 too; see https://huggingface.co/org/data, store.bin\n" in text


def test_the_licence_is_the_base_models(tmp_path):
    assert base_license(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: llama3.2\n---\n# base\n")
    assert base_license(str(tmp_path)) == "llama3.2"
    assert (
        ModelCard(run_card(config(str(tmp_path), "x.jsonl"), step=1, data=[], metrics={}, whole=True)).data.license
        == "llama3.2"
    )
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n# broken\n")
    assert base_license(str(tmp_path)) is None
    path = vocabulary(tmp_path / "base.gguf", lambda writer: writer.add_license("apache-2.0"))
    assert base_license(str(path)) == "apache-2.0"
    assert base_license("org/not-in-the-cache") is None
