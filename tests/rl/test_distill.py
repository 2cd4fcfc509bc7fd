"""Distillation with answers of the student: what a batch is made of, and runs that go on after an interruption."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from merging_tokenizer import merging_tokenizer
from oracle import ONE, Case, make_hf
from reward_runs import logged, run, settings
from safetensors.numpy import load_file
from tiny_tokenizer import make_tokenizer, save_tokenizer
from transformers import AutoTokenizer
from verbs import ftjax
from whole_runs import rows, same_adapter

from ftjax.config import Config
from ftjax.data.encoder import Encoded
from ftjax.data.pipeline import load_splits
from ftjax.errors import UserError
from ftjax.objectives import encoding_of
from ftjax.report.command import report
from ftjax.rl.distill import LessonBatches, prompt_of
from ftjax.rl.sampler import Sampler
from ftjax.train.setup import prepare

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    make_hf(Case("llama", "llama", {"hidden_size": 16, "num_hidden_layers": 1}), folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    lines = [json.dumps({"prompt": letter, "completion": f" {letter}{number}"}) for number, letter in enumerate("abcdefgh")]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_config(model, folder, out, teacher, objective=None, **training):
    own = {"name": "distill", "teacher_model_name_or_path": str(teacher), "beta": 0.5, "max_completion_length": 4}
    values = settings(model, folder, out, **{"global_batch_size": 8, **training})
    return Config.model_validate({**values, "objective": {**own, **(objective or {})}})


def make_source(config):
    setup, tokenizer = prepare(config, ONE), make_tokenizer()
    split, _ = load_splits(config.data, tokenizer, seed=config.training.seed, encoding=encoding_of(config))
    return LessonBatches(setup, split, Sampler(setup, tokenizer), tokenizer), setup, split


def test_a_batch_has_answers_of_both(model, answers, teacher, tmp_path):
    """Every second document is answered by the student, as far as the row has room; the others are the data's."""
    objective = {"lmbda": 0.5, "crossentropy_weight": 0.5}
    config = make_config(model, answers, tmp_path, teacher, objective, data={"packing": True, "max_length": 7})
    source, setup, split = make_source(config)
    batch = source.next(setup.params)
    data = {tuple(split.documents.document(place).tokens.tolist()) for place in split.chosen}
    prompts, kinds = {one[:2] for one in data}, []
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            tokens, weights, own = (batch[name][row][here] for name in ("tokens", "weights", "labels"))
            assert tuple(tokens[:2].tolist()) in prompts and len(tokens) <= 7
            trained = weights[: len(tokens) - 1] > 0
            assert trained.tolist() == [False] + [True] * (len(tokens) - 2), "of a prompt of <s> and a letter"
            assert weights[-1] == 0 and (batch["targets"][row][here][:-1] == tokens[1:]).all()
            assert (tuple(tokens.tolist()) in data) or not own[0]
            assert set(own[:-1].tolist()) <= {own[0]}
            kinds.append(own[0])
    assert sorted(kinds) == [0.0] * 4 + [1.0] * 4
    assert source.metrics["completions/mean_length"][0] <= 4 and len(source.texts) == 4


@pytest.mark.parametrize("share, count", [(0.25, 25), (0.3, 30), (1.0, 100), (0.01, 1)])
def test_the_share_is_exact(share, count):
    source = LessonBatches.__new__(LessonBatches)
    source._section = type("Section", (), {"lmbda": share})
    assert sum(source._generated(number) for number in range(100)) == count


def test_the_prompt_of_a_conversation_is_what_precedes_its_last_answer():
    tokens = np.arange(8, dtype=np.int32)
    for weights, count in (([0, 0, 1, 1, 0, 0, 1, 0], 6), ([0, 1, 1, 1, 1, 1, 1, 1], 1), ([1] * 8, 0), ([0] * 8, 8)):
        assert prompt_of(Encoded(tokens, np.array(weights, np.float32), "x")) == list(range(count))


def test_texts_have_no_prompts(model, teacher, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"text": "abc"}\n')
    with pytest.raises(UserError, match=r"prompts.jsonl:1: there is no prompt that the student could answer"):
        run(make_config(model, tmp_path, tmp_path / "run", teacher, {"lmbda": 0.5}, max_steps=1))


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory):
    """Of another tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    make_hf(Case("llama", "llama", {"hidden_size": 16, "num_hidden_layers": 1}), folder)
    merging_tokenizer(["ab", "c1", "ef"], first=3).save_pretrained(folder)
    return folder


ALIGNED = {"use_uld_loss": True, "uld_use_hybrid_loss": True}
CASES = {"both": {"lmbda": 0.5, "crossentropy_weight": 0.5}, "prompts": {"lmbda": 1}}
CASES |= {f"{name}, aligned": {**case, **ALIGNED} for name, case in CASES.items()}


@pytest.mark.parametrize("name", ["both, aligned", *(pytest.param(name, marks=pytest.mark.sweep) for name in list(CASES)[:2]),
                                  pytest.param("prompts, aligned", marks=pytest.mark.sweep)])  # fmt: skip
def test_resumed(name, model, prompts, answers, teacher, other_teacher, tmp_path):
    """To the bit, with validation data: answers of the data, or prompts that the student answers."""
    teacher = other_teacher if "aligned" in name else teacher
    folder, whole, out = answers if "both" in name else prompts, tmp_path / "whole", tmp_path / "run"
    data = {"validation": str(folder / "prompts.jsonl"), "contamination": "ignore"}
    options = {"save_steps": 3, "max_steps": 6, "gradient_accumulation_steps": 2, "eval_steps": 3, "data": data}
    run(make_config(model, folder, whole, teacher, CASES[name], **options))
    shutil.copytree(whole, out)
    for path in (out / "checkpoints" / "6", out / "final"):
        shutil.rmtree(path)
    run(make_config(model, folder, out, teacher, CASES[name], **options))
    same_adapter(whole, out)
    assert logged(out) == logged(whole)
    trained = [row for row in rows(whole) if "train/loss" in row]
    assert len({row["train/loss"] for row in trained}) == 6 and trained[-1]["train/loss"] < trained[0]["train/loss"]
    assert ("train/cross_entropy" in trained[0]) == ("both" in name) and trained[0]["train/completions/mean_length"] > 0
    evaluated = [row for row in rows(whole) if "eval/loss" in row]
    assert evaluated[-1]["eval/loss"] < evaluated[0]["eval/loss"]
    assert ("eval/completions/mean_length" in evaluated[0]) == ("prompts" in name)


# ---- commands ----


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_hf(Case("llama", "llama", {"initializer_range": 0.05, "max_position_embeddings": 512}), folder)
    save_tokenizer(folder, chat=True)
    return folder


def demo(chat, answers, out) -> list[str]:
    return [
        "configs/demo/distill.yaml", f"model.path={chat}", f"objective.teacher_model_name_or_path={chat}",
        f"data.train={answers / 'prompts.jsonl'}", "data.validation=null", "data.validation_split=2", "data.max_length=32",
        "training.max_steps=1", "training.eval_steps=1", "evaluate.training_examples=0", "mesh.fsdp=1", "mesh.data=8",
        "training.report_to=[]", f"output_dir={out}", "model.remat=none",
    ]  # fmt: skip


def test_the_demo(chat, answers, tmp_path, capsys, monkeypatch):
    """The example's configuration, on eight devices that share fewer documents, with a share for the student."""
    monkeypatch.chdir(ROOT)
    own = ["objective.lmbda=0.5", "objective.max_completion_length=4"]
    assert ftjax("train", *demo(chat, answers, tmp_path / "run"), *own) == 0, capsys.readouterr()
    assert "4 documents; 50% of them are answered by the model in training, with up to 4 tokens" in capsys.readouterr().out
    found = {name for row in rows(tmp_path / "run") for name in row}
    assert {"train/divergence", "train/cross_entropy", "train/completions/mean_length", "eval/perplexity"} <= found
    page = report(tmp_path / "run", out=tmp_path / "report.html").read_text()
    assert "Answers of the student" in page and "divergence from the teacher" in page


@pytest.mark.sweep
def test_the_demo_from_predictions(chat, answers, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    files = [f"objective.teacher_logprobs={tmp_path / 'predictions'}", "objective.loss_top_k=8", "training.global_batch_size=8"]
    given = [*demo(chat, answers, tmp_path / "run"), *files]
    assert ftjax("teach", *given) == 0, capsys.readouterr()
    assert ftjax("train", *given) == 0, capsys.readouterr()
    first = next(row for row in rows(tmp_path / "run") if "eval/loss" in row)
    assert abs(first["eval/divergence"]) < 0.1 < first["eval/cross_entropy"], "the teacher is the student at its start"


def test_teach_says_what_it_needs(chat, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"model: {{path: {chat}}}\ndata: {{train: x.jsonl}}\n")
    assert ftjax("teach", str(tmp_path / "run.yaml")) == 2
    assert "found objective sft. Set the three of them" in " ".join(capsys.readouterr().err.split())


def test_a_student_of_some_layers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from make_student import make_student

    make_hf(Case("qwen3", "qwen3", {"num_hidden_layers": 4}), tmp_path / "whole")
    save_tokenizer(tmp_path / "whole")
    make_student(str(tmp_path / "whole"), tmp_path / "student", 2)
    whole, student = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "student"))
    layers = {"model.layers.0.": "model.layers.0.", "model.layers.1.": "model.layers.3."}
    for name, value in student.items():
        of = next((name.replace(new, old) for new, old in layers.items() if name.startswith(new)), name)
        np.testing.assert_array_equal(value, whole[of], err_msg=name)
    assert len(whole) - len(student) == 2 * sum(name.startswith("model.layers.1.") for name in student)
    assert make_tokenizer().get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "student").get_vocab()
