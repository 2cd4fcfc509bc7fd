"""Tests the recipes of docs/recipes.md: every file and every documented variant is a valid configuration that builds."""

import re
import shlex
import sys
from itertools import islice
from pathlib import Path

import pytest

from ftjax.config.load import load_config
from ftjax.evaluate.rows import sources
from ftjax.plan.plan import design_for
from ftjax.plan.topology import parse
from ftjax.train.announce import next_commands

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*.yaml"))
# Published parameter counts of the checkpoints whose config.json is in configs/plan.
SIZES = {
    "configs/plan/llama-3.2-1b": 1_235_814_400,
    "configs/plan/llama-3.1-8b": 8_030_261_248,
    "configs/plan/mistral-7b-v0.3": 7_248_023_552,
    "configs/plan/qwen3-8b": 8_190_735_360,
    "configs/plan/gemma-3-1b": 999_885_952,
}


def commands(verb: str) -> list[list[str]]:
    """Return the words of every `ftjax COMMAND configs/...` in the page's code blocks, up to a comment."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(f"ftjax {verb} configs/")]
    return [shlex.split(line, comments=True)[2:] for line in lines]


def parts(words: list[str]) -> tuple[str, list[str], str]:
    """Return `(configuration, overrides, topology)` of a command."""
    topology = words[words.index("--topology") + 1]
    return words[0], [word for word in words if "=" in word], topology


PLANS = {" ".join(words): parts(words) for words in commands("plan")}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Change to the repository's root: paths in configurations are relative to it."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_opens_with_what_it_takes_and_gives(recipe):
    opening = (ROOT / recipe).read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in opening)
    assert f"ftjax train {recipe}" in "\n".join(opening)
    for heading in ("command", "hardware", "expected", "time"):
        assert any(line.startswith(f"#   {heading} ") for line in opening), heading
    assert f"ftjax train {recipe}" in PAGE
    config = load_config(recipe)
    assert config.output_dir == f"runs/{Path(recipe).stem}"
    assert [source.path for source in sources(config)]  # the data of `ftjax evaluate` is named


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_data_of_a_recipe_is_read(recipe, data_sets, tmp_path, monkeypatch):
    """All of its columns are there: the first row of what is trained and of what is evaluated becomes an example."""
    from ftjax.data.find import find
    from ftjax.data.read import read_rows
    from ftjax.data.reader import to_examples

    config = load_config(recipe)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "data").symlink_to(data_sets)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    for source in [*config.data.sources("train"), *sources(config)]:
        [example] = islice(to_examples(read_rows(source, found=find(source)), source), 1)
        assert example.references


def test_a_finished_run_is_tried_by_its_folder():
    """A run's folder is enough: it knows base model, tokenizer and prompt format."""
    config = load_config(RECIPES[0])
    [line] = [line for line in next_commands(Path(config.output_dir), config) if "ftjax generate" in line]
    assert line.endswith(f"ftjax generate {config.output_dir} --prompt '...'")


def test_every_recipe_and_every_larger_model_is_planned():
    planned = {(config, value.split("=")[1]) for config, values, _ in PLANS.values() for value in values if "path" in value}
    assert {model for _, model in planned} == set(SIZES)
    assert {config for config, _ in planned} == set(RECIPES) - {"configs/chat_instruct.yaml"}  # chat is planned once


@pytest.mark.parametrize("plan", PLANS)
def test_documented_plans_build(plan):
    """The model has the published size and every array has a sharding; compilation is left to users."""
    config, values, topology = PLANS[plan]
    parse(topology)
    made = design_for(load_config(config, values), parse("cpu:8"))
    assert sum(spec.size for spec in made.model.frozen.values()) == SIZES[made.config.model.path]
    assert made.model.trainable
    assert made.abstract_batch()["tokens"].shape[1] == made.config.training.global_batch_size


def test_the_first_sentence(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    from lead_sentence import first_sentence

    assert first_sentence(" We study x. It is 3.5 times y! Why?") == "We study x."
    assert first_sentence("No end") == "No end"
