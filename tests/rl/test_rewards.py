"""Reward functions: built-in ones, a user's own, a judge; and errors that name function and prompt."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reward_runs import make_config, run
from tiny_tokenizer import make_tokenizer, save_tokenizer

from ftjax.config.rewards import GrpoConfig, RewardSpec
from ftjax.data.example import Example
from ftjax.errors import UserError
from ftjax.evaluate.rows import Item
from ftjax.rl.clock import Clock
from ftjax.rl.own import OwnReward
from ftjax.rl.rewards import Reward, load_rewards, rewards_of
from ftjax.rl.rollout import Rollout
from ftjax.rl.source import RolloutBatches


def rollout(text: str, answer: str = "4", prompt="2+2=", **values) -> Rollout:
    example = Example("data.jsonl:7", prompt="2+2=", references=(answer,))
    return Rollout(Item(example, {"prompt": "2+2=", "answer": answer, **values}), prompt, [1], text, [5, 6], [-1, -2], False)


class Asked:
    """A configuration of nothing but rewards."""

    unasked = frozenset()

    def __init__(self, *rewards):
        self.objective = GrpoConfig(rewards=[RewardSpec.model_validate(one) for one in rewards])


def values(reward, *texts, allow=False, **options) -> list[float]:
    found = load_rewards(Asked({"name": reward, "options": options} if options else reward), allow)
    return rewards_of(found, [rollout(text) for text in texts], 60.0)[:, 0].tolist()


def test_built_in_rewards():
    assert values("exact_match", "4", "The 4", "5") == [1, 1, 0]
    assert values("exact_match", "4", "The 4", normalize=False) == [1, 0]
    assert values("numeric_answer", "so it is 4.0", "#### 4 and 5", "none") == [1, 1, 0]
    assert values("f1", "4", "4 5") == [1, pytest.approx(2 / 3)]
    assert values("json_valid", '{"a": 1}', "{a}") == [1, 0]
    assert values("regex", "x1", "1", "x", pattern=r"^x\d$") == [1, 0, 0]
    assert values("length", "any", most=1) == [-1] and values("length", "any", most=2) == [0]
    assert values("length", "any", least=4, scale=8) == [-0.25]
    english, german = (
        "The weather is very nice in the garden today.",
        "Das Wetter im Garten ist heute wirklich sehr sch\u00f6n.",
    )
    found = values("language", english, german, "ok", code="de")
    assert found[:2] == [0, 1] and np.isnan(found[2])


def test_a_json_schema(tmp_path):
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    assert values("json_schema", 'yes: {"a": 1}', '{"a": "1"}', "{}", schema=schema) == [1, 0, 0]
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    assert values("json_schema", '{"a": 1}', schema=str(tmp_path / "schema.json")) == [1]


def test_code_runs_only_where_it_is_asked_for():
    with pytest.raises(UserError, match="--allow-code-execution"):
        load_rewards(Asked("code"))
    (reward,) = load_rewards(Asked({"name": "code", "options": {"timeout": 5}}), allow_code_execution=True)
    answers = [rollout(f"```python\nx = {number}\n```", test="assert x == 4") for number in (4, 5)]
    assert rewards_of([reward], answers, 60.0)[:, 0].tolist() == [1, 0]


@pytest.mark.parametrize(
    "rewards, said",
    [
        ([], "there is nothing to learn from"),
        (["exact_mtach"], "there is no such reward; there are exact_match"),
        ([{"name": "regex", "options": {"patern": "x"}}], "unknown: patern; missing: pattern"),
        ([{"name": "regex", "options": {"pattern": "("}}], "is not a regular expression"),
        ([{"name": "exact_match", "options": {"stop": "x"}}], "not stop"),
        (["missing.py"], "missing.py: no such file"),
        ([{"name": "judge", "options": {"url": "http://x", "model": "m", "prompt": "rate"}}], "has to show the answer"),
    ],
)
def test_wrong_settings(rewards, said):
    with pytest.raises(UserError) as caught:
        load_rewards(Asked(*rewards))
    assert said in str(caught.value)


# ---- a user's own ----

OWN = """
import asyncio

def length(completions, answer, log_metric, **columns):
    assert set(columns) == {"prompts", "completion_ids", "trainer_state", "log_extra"}, columns
    log_metric("longest", max(map(len, completions)))
    return [len(text) if len(text) > 1 else None for text in completions]

async def later(completions, answer):
    await asyncio.sleep(0)
    return [float(text == right) for text, right in zip(completions, answer)]

def turns(prompts, completions):
    return [float(turns[0]["content"] == "4" and prompt[-1]["role"] == "user") for prompt, turns in zip(prompts, completions)]
"""


def test_own_functions_have_the_signature_of_trl(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    found = load_rewards(Asked(f"{path}:length", f"{path}:later", f"{path}:later"))
    assert [one.name for one in found] == ["length", "later-1", "later-2"]
    got = rewards_of(found, [rollout("4"), rollout("44")], 60.0)
    np.testing.assert_equal(got, np.array([[np.nan, 1, 1], [2, 0, 0]], np.float32))
    assert found[0].function.metrics == {"longest": 2}
    (reward,) = load_rewards(Asked(f"{path}:turns"))
    messages = [{"role": "user", "content": "2+2="}]
    assert rewards_of([reward], [rollout("4", prompt=messages)], 60.0).tolist() == [[1]]
    with pytest.raises(UserError, match=r"name one as FILE\.py:FUNCTION; functions found: length, later, turns"):
        load_rewards(Asked(str(path)))


def test_numbers_of_numpy_and_pytorch():
    values = [np.bool_(True), np.float32(2), torch.tensor(3.0), np.array(4), 5, None]
    found = rewards_of([Reward("own", lambda rollouts: values)], [rollout("4")] * 6, 60.0)
    np.testing.assert_equal(found[:, 0], np.array([1, 2, 3, 4, 5, np.nan], np.float32))


def test_what_is_logged_when_answers_are_drawn_again():
    """Of two draws the first has a group that is kept and one that is not; the second takes the place of that. What is logged
    beside an answer stays beside it, and a metric is the mean of three groups."""
    texts = iter([["1", "2", "3", "3"], ["4", "5"]])

    def own(completions, log_extra, log_metric):
        log_metric("largest", max(map(float, completions)))
        log_extra("own", [text * 2 for text in completions])
        return [float(text) for text in completions]

    section = GrpoConfig(rewards=["own"], num_generations=2, dynamic_sampling=True)
    source = object.__new__(RolloutBatches)
    source._section, source._groups, source._done, source._rewards = section, 2, 0, [Reward("own", OwnReward(own))]
    source._draw = SimpleNamespace(drawn=0, take=lambda count: [0] * count)
    source._prompts, source._environments = SimpleNamespace(questions=[None]), None
    source._sampler = SimpleNamespace(answer=lambda *_: [rollout(text) for text in next(texts)])
    rollouts, values, extra, logged = source._rewarded({}, Clock())
    assert [one.text for one in rollouts] == ["1", "2", "4", "5"] and values.ravel().tolist() == [1, 2, 4, 5]
    assert extra == [{"own": "11"}, {"own": "22"}, {"own": "44"}, {"own": "55"}]
    assert logged == {"largest": pytest.approx((2 * 3 + 5) / 3)}


def raises(rollouts):
    raise KeyError("answer")


BAD = {
    "raises": (
        raises,
        r"reward bad: KeyError: 'answer' \(test_rewards.py:\d+\), for 2 answers, the first .* data.jsonl:7: '2\+2='",
    ),
    "hangs": (lambda rollouts: threading.Event().wait(), r"it has not ended after 0.2 s .* data.jsonl:7: '2\+2='"),
    "nan": (lambda rollouts: [1.0, float("nan")], "it returned nan for an answer to the prompt of data.jsonl:7"),
    "huge": (lambda rollouts: [1.0, 1e300], "it returned 1e[+]300 for an answer .* expected a number from -1e[+]18 to 1e[+]18"),
    "text": (lambda rollouts: ["good", 1], "it returned 'good' for an answer to the prompt of data.jsonl:7"),
    "count": (lambda rollouts: [1.0], "it returned 1 values for 2 answers, the first to the prompt of data.jsonl:7"),
    "number": (lambda rollouts: 1.0, "it returned 1.0 for 2 answers"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(name):
    function, said = BAD[name]
    with pytest.raises(UserError, match=said):
        rewards_of([Reward("bad", function)], [rollout("4"), rollout("5")], 0.2 if name == "hangs" else 60.0)


def test_a_failure_keeps_the_state_of_the_run(model, prompts, tmp_path):
    """The reward fails at the third update: the first two are saved, and the run goes on from there."""
    path = tmp_path / "own.py"
    text = 'def own(completions, trainer_state):\n    assert {}\n    return [float("a" in text) for text in completions]\n'
    path.write_text(text.format("trainer_state.global_step != 3"))
    config = make_config(model, prompts, tmp_path / "run", {"rewards": [str(path)]}, max_steps=3)
    with pytest.raises(UserError, match="reward own: AssertionError"):
        run(config)
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir() and not (tmp_path / "run" / "final").exists()
    path.write_text(text.format("True"))
    run(config)
    assert (tmp_path / "run" / "final").is_dir()


def test_a_row_without_an_answer(model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(UserError, match=r"prompts.jsonl:2: the reward exact_match compares with the answer of the row"):
        run(make_config(model, tmp_path, tmp_path / "run", {"rewards": ["exact_match"]}))


# ---- models ----


@pytest.fixture(scope="module")
def scorer(model, tmp_path_factory):
    """A reward model of transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("scorer") / "scorer"
    torch.manual_seed(0)
    theirs = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    theirs.score.weight.data.normal_()
    theirs.save_pretrained(folder)
    save_tokenizer(folder)
    return folder, theirs.eval()


def test_a_reward_model_scores_as_transformers(scorer):
    import torch

    folder, theirs = scorer
    texts = ["4", "five", ""]
    (reward,) = load_rewards(Asked(str(folder)))
    assert reward.name == "scorer"
    got = rewards_of([reward], [rollout(text) for text in texts], 60.0)[:, 0]
    tokenizer = make_tokenizer()
    for text, score in zip(texts, got, strict=True):
        with torch.no_grad():
            ids = [*tokenizer(f"2+2={text}")["input_ids"], tokenizer.eos_token_id]
            assert score == pytest.approx(theirs(torch.tensor([ids])).logits.item(), abs=1e-4)


def test_a_model_without_a_head_of_one_output(model):
    (reward,) = load_rewards(Asked(str(model)))
    with pytest.raises(UserError, match="a reward model has a head of one output, and this model has no classification head"):
        rewards_of([reward], [rollout("4")], 60.0)
    with pytest.raises(UserError, match="takes the options dtype, batch_size; unknown: size"):
        load_rewards(Asked({"name": str(model), "options": {"size": 1}}))


# ---- a judge ----


@pytest.fixture
def server():
    """A server that rates an answer by what is in it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = asked["messages"][0]["content"]
            assert asked["temperature"] == 0 and self.headers["Authorization"] == "Bearer secret"
            said = "I say: 8" if "Answer:\n4" in text else "no idea"
            self.send_response(400 if "refuse" in text else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_a_judge(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    options = {"url": server, "model": "m", "api_key_env": "JUDGE_KEY"}
    assert values("judge", "4", "4 it is", **options) == pytest.approx([0.8, 0.8])
    with pytest.raises(UserError, match=r"data\.jsonl:7: the judge at .* replied without a number: 'no idea'"):
        values("judge", "5", **options)
    with pytest.raises(UserError, match="refused a request: 400"):
        values("judge", "refuse", **options)
    with pytest.raises(UserError, match="cannot be reached"):
        values("judge", "4", **{**options, "url": "http://127.0.0.1:9/v1"})
