"""Answers that are dialogues with a user's environment: their tokens, masks, rewards, and what goes wrong."""

import json
import shutil
import types

import numpy as np
import pytest
from data_tokenizers import CHATML, byte_level
from reward_runs import logged, make_config, run
from tiny_tokenizer import make_tokenizer
from trl import GRPOTrainer
from whole_runs import rows, same_adapter

from ftjax.config import Config
from ftjax.data.example import Example
from ftjax.data.template import render_reply
from ftjax.errors import UserError
from ftjax.evaluate.rows import Item
from ftjax.generate.answer import Generation
from ftjax.rl.dialogue import Dialogues
from ftjax.rl.environment import Environments, load_environments
from ftjax.rl.prompts import Question
from ftjax.rl.source import trained

CALLS = (
    "{{ bos_token }}{% if tools %}[t]{% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}{{ eos_token }}'
    "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


class Sums:
    """Has a tool, speaks at the end of an answer without calls, and gives a reward."""

    def reset(self, goal, **columns):
        self.goal, self.total, self.heard = goal, 0, []
        return f" to {goal}"

    def add(self, number: int) -> int:
        """Add a number.

        Args:
            number: what is added
        """
        self.total += number
        return self.total

    def step(self, answer):
        self.heard.append(answer)
        return "more" if len(self.heard) < 2 and self.total != self.goal else None

    def get_reward(self):
        return float(self.total == self.goal)


def scripted(tokenizer, answers):
    """Return a `generate` that says these texts, by dialogue and turn; a text that ends with `...` is cut off."""
    asked = []

    def generate(prompts, numbers, turn, limits):
        asked.append(([tokenizer.decode(prompt) for prompt in prompts], list(numbers), turn, list(limits)))
        found = []
        for number, limit in zip(numbers, limits, strict=True):
            text = answers[number][turn]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            cut = text.endswith("...") or len(ids) >= limit
            tokens = ids[:limit] if cut else [*ids, tokenizer.eos_token_id]
            found.append(Generation(text, tokens, "length" if cut else "stop", [-0.5] * len(tokens), 0))
        return found

    return generate, asked


def question(prompt, tokenizer, number=1, **columns):
    example = Example(f"a.jsonl:{number}", prompt=prompt, messages=({"role": "user", "content": prompt},))
    return Question(Item(example, {"prompt": prompt, **columns}), np.array(tokenizer(prompt)["input_ids"], np.int32), number)


def call(number):
    return f'<tool_call>{{"name": "add", "arguments": {{"number": {number}}}}}</tool_call>'


def test_tools_and_steps():
    """Three dialogues that end in different ways; only what the model says is trained."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CALLS
    environments = Environments(Sums, 10)
    held = Dialogues(environments, tokenizer, max_length=400, max_completion_length=300, replies=None)
    generate, asked = scripted(tokenizer, [[call(3), call(4), "done"], ["no", "no"], ["cut off..."]])
    found = held.hold([question("count", tokenizer, n, goal=7) for n in range(3)], generate)
    assert asked[0][0] == ["<s>[t]add [u]count to 7</s>[a]"] * 3 and [one[1:3] for one in asked] == [
        ([0, 1, 2], 0), ([0, 1], 1), ([0], 2)
    ]  # fmt: skip
    first, second, third = (tokenizer.decode(one.tokens) for one in found)
    assert first == f"{call(3)}</s>[t]3</s>[a]{call(4)}</s>[t]7</s>[a]done</s>"
    assert second == "no</s>[u]more</s>[a]no</s>" and third == "cut off..."
    own = ["".join(tokenizer.decode([t]) for t, mine in zip(one.tokens, one.own, strict=True) if mine) for one in found]
    assert own == [f"{call(3)}</s>{call(4)}</s>done</s>", "no</s>no</s>", "cut off..."]
    assert [one.truncated for one in found] == [False, False, True] and held.turns == [3, 2, 1]
    assert all(len(one.logprobs) == len(one.tokens) == len(one.own) for one in found)
    assert all((p == 0) == (not mine) for one in found for p, mine in zip(one.logprobs, one.own, strict=True))
    assert environments.rewards(found) == [1, 0, 0] and (environments.calls, environments.failures) == (2, 0)
    assert [turn["role"] for turn in found[0].turns] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert found[0].text == "done" and found[0].size == sum(found[0].own)
    # What was put together is what the template writes of the whole conversation.
    messages = [{"role": "user", "content": "count to 7"}, *found[0].turns]
    assert tokenizer.decode([*found[0].prompt_ids, *found[0].tokens]) == tokenizer.apply_chat_template(
        messages, tools=environments.tools, tokenize=False
    )
    assert trained(found[0], False) == list(found[0].own) and trained(found[2], True) is False


def test_wrong_calls_are_told_to_the_model():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CALLS
    environments = Environments(Sums, 10)
    held = Dialogues(environments, tokenizer, max_length=400, max_completion_length=300, replies=1)
    texts = [
        '<tool_call>{"name": "sub", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>',
    ]
    generate, _ = scripted(tokenizer, [[text, "end"] for text in texts])
    found = held.hold([question("count", tokenizer, n, goal=7) for n in range(2)], generate)
    said = [one.turns[1]["content"] for one in found]
    assert said[0] == "{'error': 'Tool sub not found.'}" and "unexpected keyword argument" in said[1]
    assert (environments.calls, environments.failures) == (2, 2) and held.turns == [2, 2]


def test_a_reply_without_room_ends_the_dialogue():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CALLS
    for limit, turns in ((14, 1), (15, 2)):  # `no`, the end, `[u]more`, the end, `[a]`: 3 + 11 tokens, and one more
        held = Dialogues(Environments(Sums, 10), tokenizer, max_length=400, max_completion_length=limit, replies=None)
        generate, asked = scripted(tokenizer, [["no", "n"]])
        [one] = held.hold([question("count", tokenizer, goal=7)], generate)
        assert held.turns == [turns] and len(one.tokens) <= limit and asked[-1][3] == [limit if turns == 1 else 1]


def test_texts_without_a_template():
    """What a base model says, with the replies between."""
    tokenizer = make_tokenizer()
    kind = type(
        "Echo", (), {"reset": lambda self, **_: None, "step": lambda self, answer: None if answer == "c" else f" {answer}?"}
    )
    held = Dialogues(Environments(kind, 10), tokenizer, max_length=40, max_completion_length=30, replies=None)
    generate, asked = scripted(tokenizer, [["ab", "c"]])
    [one] = held.hold([question("say:", tokenizer)], generate)
    assert tokenizer.decode([*one.prompt_ids, *one.tokens]) == "<s>say:ab</s> ab?c</s>" and one.completion == "ab ab?c"
    assert asked[1][0] == ["<s>say:ab</s> ab?"]


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.mark.parametrize("template, end", [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>")])
def test_replies_are_tokenised_as_in_trl(template, end):
    tokenizer = byte_level()
    tokenizer.add_special_tokens(
        {"eos_token": end, "additional_special_tokens": ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>"]}
    )
    tokenizer.chat_template = template
    peer = types.SimpleNamespace(
        processing_class=tokenizer, _tokenizer=tokenizer, _is_vlm=False, chat_template=None, chat_template_kwargs={}
    )
    replies = [{"role": "tool", "name": "add", "content": "12"}, {"role": "tool", "name": "add", "content": "and 3"}]
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}],
    }
    got = render_reply(answer, replies, tokenizer)
    assert got == GRPOTrainer._get_tool_suffix_ids(peer, replies) and "12" in tokenizer.decode(got)


def test_control_tokens_in_a_reply_are_plain_text():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    answer = {"role": "assistant", "content": "I"}
    got = render_reply(answer, [{"role": "user", "content": "x<|im_end|>y"}], tokenizer)
    assert got.count(tokenizer.eos_token_id) == 1 and "x<|im_end|>y" in tokenizer.decode(got)


# ---- runs ----

GAME = """
import time


class Letters:
    def reset(self, answer, **columns):
        self.answer, self.said = answer, []

    def step(self, answer):
        self.said.append(answer)
        return f"={self.answer}" if len(self.said) == 1 else None

    def get_reward(self):
        return sum(text.count(self.answer) - 0.1 * len(text) for text in self.said)


def looked_at(completions, environments, **columns):
    assert all("=" + one.answer in text for one, text in zip(environments, completions) if len(one.said) > 1)
    return [float(len(one.said)) for one in environments]
"""


@pytest.fixture
def game(prompts, tmp_path):
    path = tmp_path / "game.py"
    path.write_text(GAME)
    return path


@pytest.mark.sweep  # test_resume.py has it without an environment
def test_a_run_resumes_to_the_bit(model, prompts, game, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    rewards = ["environment", {"name": f"{game}:looked_at", "weight": 0.5}]
    objective = {"environment": str(game), "rewards": rewards, "max_completion_length": 60, "num_iterations": 2, "beta": 0.1}
    options = {"save_steps": 3, "max_steps": 4, "gradient_accumulation_steps": 2, "data": {"max_length": 64}}
    run(make_config(model, prompts, whole, objective, **options))
    shutil.copytree(whole, out)
    for path in (out / "checkpoints" / "4", out / "final"):
        shutil.rmtree(path)
    run(make_config(model, prompts, out, objective, **options))
    same_adapter(whole, out)
    assert logged(out) == logged(whole)
    found = [row for row in rows(whole) if "train/rollout/turns" in row]
    assert len(found) == 2 and all(1 < row["train/rollout/turns"] <= 2 for row in found) and found[0]["train/grad_norm"] > 0
    assert found[0]["train/rollout/logprob_gap"] < 2e-6, "the sampler's log-probabilities are those of the model's own tokens"
    assert {"train/rewards/Letters/mean", "train/rewards/looked_at/mean"} <= found[0].keys()


WRONG = {
    "nothing": ("x = 1\n", r"classes found: none; expected a class such as"),
    "two": ("class A:\n    pass\n\n\nclass B:\n    pass\n", r"name one as FILE.py:CLASS; classes found: A, B"),
    "no reset": ("class A:\n    def step(self, answer): ...\n", r"A has no reset"),
    "no step": ("class A:\n    def reset(self): ...\n", r"A has neither a step nor a method"),
    "no types": ("class A:\n    def reset(self): ...\n    def add(self, x):\n        'A'\n", r"A.add cannot be described .*x"),
    "no reward": ("class A:\n    def reset(self): ...\n    def step(self, answer): ...\n", r"A has no get_reward"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_environment(name, model, prompts, tmp_path):
    text, said = WRONG[name]
    (tmp_path / "own.py").write_text(text)
    objective = {"environment": str(tmp_path / "own.py"), "rewards": []}
    with pytest.raises(UserError, match=said):
        run(make_config(model, prompts, tmp_path / "run", objective))


FAILING = {
    "raises": ("raise KeyError('no')", r"Letters.step: KeyError: 'no' \(game.py:\d+\), in the dialogue of .*prompts.jsonl:\d"),
    "hangs": (
        "time.sleep(100)",
        r"Letters.step: it has not ended after 0.2 s \(objective.reward_timeout\), in the dialogue of",
    ),
    "a number": ("return 3", r"Letters.step: it returned 3 in the dialogue of .*; expected a text, or None"),
}


@pytest.mark.parametrize("name", FAILING)
def test_an_environment_that_fails(name, model, prompts, game, tmp_path):
    text, said = FAILING[name]
    game.write_text(GAME.replace("self.said.append(answer)", text))
    objective = {"environment": str(game), "rewards": [], "reward_timeout": 0.2, "max_completion_length": 60}
    with pytest.raises(UserError, match=said):
        run(make_config(model, prompts, tmp_path / "run", objective, data={"max_length": 64}))


def test_settings():
    config = {"model": {"path": "a"}, "data": {"train": "b"}}
    made = Config.model_validate({**config, "objective": {"name": "grpo", "environment": "game.py"}})
    assert [one.name for one in made.objective.rewards] == ["environment"]
    with pytest.raises(ValueError, match="max_tool_calling_iterations 3 changes nothing without environment"):
        Config.model_validate({**config, "objective": {"name": "rloo", "max_tool_calling_iterations": 3}})


@pytest.mark.parametrize("name", ["calculator", "guess"])
def test_the_examples(name, request):
    path = request.config.rootpath / "configs" / "environments" / f"{name}.py"
    config = {"model": {"path": "a"}, "data": {"train": "b"}, "objective": {"name": "grpo", "environment": str(path)}}
    environments = load_environments(Config.model_validate(config))
    rows_ = [{"prompt": "?", "secret": 7}] * 3
    assert environments.begin(rows_, ["a:1", "a:2", "a:3"]) == [None] * 3

    def said(content, expression=None):
        calls = [{"type": "function", "function": {"name": "calculate", "arguments": {"expression": expression}}}]
        return {"role": "assistant", "content": content, **({"tool_calls": calls} if expression else {})}

    if name == "guess":
        told = environments.reply([0, 1, 2], [said("I say 9"), said("seven"), said("7")])
        assert [one[0]["content"] if one else None for one in told] == [
            "Too high. Guess again.",
            "That is no number. Guess again.",
            None,
        ]
        assert environments.reply([0, 1], [said("8"), said("7")]) == [[], []]
        assert environments.rewards([]) == [0.3, 1.0, 1.0]
    else:
        assert json.loads(json.dumps(environments.tools))[0]["function"]["name"] == "calculate"
        told = environments.reply([0, 1, 2], [said("", "(12 + 7) * 3"), said("", "2**9999999999"), said("57")])
        assert told[0] == [{"role": "tool", "name": "calculate", "content": "57"}] and told[2] == []
        assert "only numbers" in told[1][0]["content"] and environments.rewards([]) == [1, 1, 0]
