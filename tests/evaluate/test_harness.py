"""Tests that lm-evaluation-harness gives the same numbers with `--model ftjax` as with `--model hf` on the same weights."""

import json
from pathlib import Path

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._index import TaskIndex
from peft import PeftModel
from tiny_tokenizer import save_tokenizer
from transformers import AutoModelForCausalLM
from verbs import evaluate_harness, ftjax

from ftjax import lm_eval
from ftjax.config.evaluate import LmEvalConfig
from ftjax.errors import UserError
from ftjax.evaluate.lm_eval.command import load_tasks
from ftjax.evaluate.lm_eval.harness import FtjaxLM
from ftjax.generate.session import Generator

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's warnings about its own packages

TASKS = {
    "letters": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",        "target_delimiter": "", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{story}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{story}}",
        "generation_kwargs": {"until": ["X", "]]"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
ROWS = [
    {"question": "abc", "choices": ["a", "b", "c"], "gold": 1, "story": "a fat cat sat"},
    {"question": "what is it? ", "choices": ["yes", "no", "maybe not"], "gold": 0, "story": "the dog ran. " * 12},
    {"question": "", "choices": ["xy", "z"], "gold": 1, "story": "z"},
    {"question": "long " * 30, "choices": ["q", "rs", "q"], "gold": 2, "story": "no more " * 5},
    {"question": "d", "choices": ["e", "f"], "gold": 0, "story": "e"},
]


@pytest.fixture(autouse=True, scope="module")
def few_tasks_of_lm_eval():
    """lm_eval reads its 13 thousand task files whenever it begins, for some seconds; here it has a handful."""
    files = TaskIndex._iter_yaml_files

    def few(root):
        return files(root / "hellaswag" if root == Path(lm_eval_tasks.__file__).parent else root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(few))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shared = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "test_split": "test",
        "num_fewshot": 0,
    }  # fmt: skip
    for name, values in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **values}))
    return folder


@pytest.fixture(scope="module")
def hf(tiny):
    return HFLM(pretrained=str(tiny), dtype="float32", device="cpu", batch_size=2)


@pytest.fixture
def ours(tiny):
    return FtjaxLM(Generator(str(tiny)), batch_size=2)


def score(model, folder, names=tuple(TASKS), **options):
    found, manager = load_tasks(LmEvalConfig(tasks=[str(folder / f"{name}.yaml") for name in names]))
    return simple_evaluate(model, tasks=found, task_manager=manager, bootstrap_iters=0, **options)


def same(a, b) -> None:
    """Assert equal metrics, and equal responses of the model to every row."""
    assert a["results"].keys() == b["results"].keys() and a["results"]
    for task, metrics in a["results"].items():
        for name, value in metrics.items():
            assert b["results"][task][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name
        for one, other in zip(a["samples"][task], b["samples"][task], strict=True):
            assert one["arguments"] == other["arguments"]
            for got, want in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                if isinstance(got, str):
                    assert got == want
                else:
                    assert got == pytest.approx(want, abs=1e-3)


def test_numbers_are_those_of_hf(hf, ours, tasks):
    """Covers empty and overlong contexts, trailing spaces, answers of one and of several tokens, and stop strings."""
    a, b = score(ours, tasks), score(hf, tasks)
    same(a, b)
    assert a["results"]["rolling"]["word_perplexity,none"] > 1
    answers = [row["filtered_resps"][0] for row in a["samples"]["writing"]]
    assert len(set(answers)) > 1 and not any("X" in text or "]]" in text for text in answers)
    assert any(len(text) < 12 for text in answers)


def test_chat_template_and_few_shots(tiny, tmp_path, tasks):
    """Messages become the template's text, which has its own BOS; few-shot examples become turns."""
    import shutil

    shutil.copytree(tiny, tmp_path / "chat")
    save_tokenizer(tmp_path / "chat", chat=True)
    theirs = HFLM(pretrained=str(tmp_path / "chat"), dtype="float32", device="cpu", batch_size=4)
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True, "system_instruction": "be"}
    names = ("letters", "writing")
    a, b = (score(model, tasks, names, **options) for model in (FtjaxLM(str(tmp_path / "chat")), theirs))
    same(a, b)
    assert a["samples"]["letters"][0]["arguments"][0][0] == "<s>[s]be</s>[u]abc</s>[a]"


def test_the_same_question_is_computed_once(ours, monkeypatch):
    """Answers of one token share a row; texts of similar length share a batch."""
    shapes = []
    real = ours.generator.engine.score
    monkeypatch.setattr(ours.generator.engine, "score", lambda p, *x: (shapes.append(x[0].shape), real(p, *x))[1])
    pairs = [("abc:", choice) for choice in "abcdef"] + [("abcd" * 12, "xy")]
    found = ours.loglikelihood([request(pair) for pair in pairs], disable_tqdm=True)
    assert len(shapes) == 1 and shapes[0][0] == 2
    alone = [ours.loglikelihood([request(pair)], disable_tqdm=True)[0] for pair in pairs]
    assert [a for a, _ in found] == pytest.approx([a for a, _ in alone], abs=1e-5)
    assert [g for _, g in found] == [g for _, g in alone]


def test_results_are_cached(ours, tmp_path):
    cached = CachingLM(ours, str(tmp_path / "cache.db"))
    requests = [request(("abc:", "a"))]
    first = cached.loglikelihood(requests)
    ours.generator = None
    assert cached.loglikelihood(requests) == first


def request(arguments):
    return Instance("loglikelihood", {}, arguments, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "expected path=MODEL_OR_RUN"),
        ({"path": "x", "pretrained": "y"}, "unknown: pretrained"),
        ({"path": "/no/such"}, "/no/such"),
    ],
)
def test_refused_arguments(arguments, says):
    with pytest.raises(UserError, match=says):
        FtjaxLM(**arguments)


def test_refused_requests(ours, tiny):
    with pytest.raises(UserError, match="max_length: 100 tokens; the model's context is 64"):
        FtjaxLM(ours.generator, max_length=100)
    with pytest.raises(UserError, match="num_beams is not known"):
        ours.generate_until([request(("a", {"num_beams": 4}))])
    with pytest.raises(UserError, match="leave no room for a prompt"):
        ours.generate_until([request(("a", {"max_gen_toks": 64}))])
    with pytest.raises(UserError, match="no task is named 'no-such-task'"):
        evaluate_harness(str(tiny), tasks=["no-such-task"])


# ---- the commands ----


def test_ftjax_evaluate(run, tiny, tasks, tmp_path, capsys):
    """A run beside its base; hf with the PEFT folder gives the same."""
    code = ftjax("evaluate", str(run), "--lm-eval", f"{tasks}/letters.yaml", "--out", str(tmp_path), "--compare-base")
    shown = capsys.readouterr().out
    assert code == 0 and shown.count("|letters|") == 2 and "acc_norm" in shown
    results = json.loads((tmp_path / "results.json").read_text())
    base = str(tiny)
    tuned = None
    for found, adapted in ((results, True), (results["base"], False)):
        model = AutoModelForCausalLM.from_pretrained(base)
        model = PeftModel.from_pretrained(model, run / "final") if adapted else model
        want = score(HFLM(pretrained=model, tokenizer=base, batch_size=2), tasks, ["letters"])
        assert found["results"]["letters"]["acc,none"] == want["results"]["letters"]["acc,none"]
        tuned = tuned or want
    rows = [json.loads(line) for line in (tmp_path / "samples_letters.jsonl").read_text().splitlines()]
    for row, want in zip(rows, tuned["samples"]["letters"], strict=True):
        for got, one in zip(row["filtered_resps"], want["filtered_resps"], strict=True):
            assert float(got[0]) == pytest.approx(one[0], abs=1e-3)


def test_devices_of_ones_choice(run, tasks, tmp_path):
    with pytest.raises(UserError, match=r"mesh: fsdp=3 does not use 1 device\(s\) exactly"):
        evaluate_harness(str(run), ["mesh.fsdp=3"], tasks=[f"{tasks}/letters.yaml"], out=tmp_path)


def test_lm_evals_own_command(tiny, tasks, monkeypatch, capsys):
    command = ["lm_eval", "--model", "ftjax", "--model_args", f"path={tiny}", "--tasks", "writing"]
    monkeypatch.setattr("sys.argv", [*command, "--include_path", str(tasks)])
    lm_eval.main()
    assert "|writing|" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command[:4], "paht=x", *command[5:], "--include_path", str(tasks)])
    with pytest.raises(SystemExit) as caught:
        lm_eval.main()
    assert caught.value.code == 2 and "unknown: paht" in capsys.readouterr().err
