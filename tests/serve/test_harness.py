"""Tests that lm-evaluation-harness finds the same numbers through a server, with its own clients, as with `--model hf`."""

import json

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from ftjax.config.evaluate import LmEvalConfig
from ftjax.evaluate.lm_eval.command import load_tasks

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's warnings about its own packages

ROWS = [
    {"question": "Tom went to the", "choices": [" park", " dog and ran", " end"], "gold": 1, "story": "Tom ran. " * 9},
    {"question": "The dog said", "choices": [" yes", " no"], "gold": 0, "story": "The dog and Tom"},
    {"question": "One day " * 20, "choices": [" a", " Tom"], "gold": 1, "story": "a"},
]
TASKS = {
    "choosing": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold", "target_delimiter": "", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{story}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{story}}",
        "generation_kwargs": {"until": ["X", "e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    shared = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "test_split": "test",
        "num_fewshot": 0,
    }  # fmt: skip
    for name, values in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **values}))
    return folder


def score(model, folder, names, **options):
    found, manager = load_tasks(LmEvalConfig(tasks=[str(folder / f"{name}.yaml") for name in names]))
    return simple_evaluate(model, tasks=found, task_manager=manager, bootstrap_iters=0, **options)


def same(a, b) -> None:
    """Assert equal metrics, and equal responses of the model to every row."""
    for task, metrics in a["results"].items():
        for name, value in metrics.items():
            assert b["results"][task][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name
        for one, other in zip(a["samples"][task], b["samples"][task], strict=True):
            for got, want in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                if isinstance(want, str):  # decoded by themselves, tokens lose the space that they begin with
                    assert got.lstrip() == want.lstrip()
                else:
                    assert got == pytest.approx(want, abs=1e-3)


@pytest.fixture(scope="module")
def hf(chatty):
    return HFLM(pretrained=str(chatty), dtype="float32", device="cpu", batch_size=1)


@pytest.mark.parametrize("prompts", [1, 3])
def test_local_completions(server, chatty, hf, tasks, prompts):
    """Likelihoods come with `echo`, several prompts a request; prompts are longer than what one step reads."""
    model = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", tokenizer=str(chatty), batch_size=prompts,
        tokenizer_backend="huggingface", add_bos_token=True,
    )  # fmt: skip
    a = score(model, tasks, TASKS)
    same(a, score(hf, tasks, TASKS))
    assert len({one["filtered_resps"][0] for one in a["samples"]["writing"]}) > 1


def test_local_chat_completions(server, hf, tasks):
    model = LocalChatCompletion(base_url=f"{server.url}/v1/chat/completions", model="tiny")
    options = {"apply_chat_template": True, "system_instruction": "be brief"}
    same(score(model, tasks, ["writing"], **options), score(hf, tasks, ["writing"], **options))
