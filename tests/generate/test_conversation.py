"""Tests chat: streamed answers, a cache that is kept between turns, commands."""

import pytest
from verbs import chat

from ftjax.errors import UserError
from ftjax.generate.context import recommended
from ftjax.generate.conversation import Conversation
from ftjax.generate.paged import PagedBatch
from ftjax.generate.request import Request
from ftjax.generate.sample import Sampling
from ftjax.generate.session import Generator

TEMPLATE = "{% for m in messages %}{{ m.content }}{{ ' ' if m.role != 'assistant' else '\n' }}{% endfor %}"
ASKED = ["Once upon a time", "Tom was sad.", "Then a cat"]


@pytest.fixture(scope="module")
def storyteller(stories) -> Generator:
    return Generator(str(stories), dtype="float32", chat_template=TEMPLATE)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=20, repetition_penalty=1.2)], ids=str)
def test_answers_are_those_without_a_memory(storyteller, sampling):
    """The cache of earlier turns equals what would be computed anew."""
    talk = Conversation(storyteller, Request(sampling=sampling, max_new_tokens=24, seed=5))
    messages, kept, counts, asked = [], [0], [], []
    for text in ASKED:
        messages.append({"role": "user", "content": text})
        asked.append(list(messages))
        messages.append({"role": "assistant", "content": "".join(talk.ask(text))})
        kept.append(talk._scheduler.reused - sum(kept))
        counts.append(talk.tokens)
    # The number of a prompt, which is part of its random key, is that of the turn.
    settings = {name: getattr(sampling, name) for name in vars(sampling)}
    alone = storyteller.generate(asked, max_new_tokens=24, seed=5, **settings)
    assert [(one.text, len(one.tokens)) for one in alone] == list(
        zip([m["content"] for m in messages[1::2]], counts, strict=True)
    )
    assert talk.messages == messages
    assert kept[1] == 0 and len(storyteller.encode(messages[:1])) < kept[2] < kept[3]  # the answer's pages, too


def test_an_answer_that_is_stopped_early(storyteller):
    talk = Conversation(storyteller, Request(max_new_tokens=100))
    pieces = talk.ask(ASKED[0])
    said = next(pieces) + next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    again = "".join(talk.ask("and"))
    alone = storyteller.generate([talk.messages[:-1]], max_new_tokens=100)[0]
    assert again == alone.text


def test_an_interruption_within_a_step(storyteller, monkeypatch):
    """The cache is discarded and computed anew."""
    talk = Conversation(storyteller, Request(max_new_tokens=100))
    pieces = talk.ask(ASKED[0])
    next(pieces)

    def interrupted(*arguments):
        decode(*arguments)
        raise KeyboardInterrupt

    decode = PagedBatch.decode
    monkeypatch.setattr(PagedBatch, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in pieces:
            pass
    monkeypatch.undo()
    assert "".join(talk.ask("and")) == storyteller.generate([talk.messages[:-1]], max_new_tokens=100)[0].text


def test_stop_strings_are_never_shown(storyteller):
    whole = "".join(Conversation(storyteller, Request(max_new_tokens=60)).ask(ASKED[0]))
    stop = whole[30:38]
    talk = Conversation(storyteller, Request(max_new_tokens=60, stop=(stop,)))
    shown = list(talk.ask(ASKED[0]))
    assert "".join(shown) == whole[: whole.index(stop)]


def test_reset_and_system(storyteller):
    talk = Conversation(storyteller, Request(max_new_tokens=2), system="Be kind.")
    "".join(talk.ask("Hi"))
    assert len(talk.messages) == 3
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be kind."}]
    talk.system(None)
    assert talk.messages == []


def test_a_conversation_that_outgrows_the_context(storyteller):
    talk = Conversation(storyteller, Request(max_new_tokens=4))
    "".join(talk.ask("Hi"))
    kept = list(talk.messages)
    with pytest.raises(UserError, match="context is 512"):
        next(talk.ask("word " * 600))
    assert talk.messages == kept


def test_without_a_chat_template(stories):
    with pytest.raises(UserError, match="--chat-template"):
        Conversation(Generator(str(stories), dtype="float32"), Request())


def test_recommended_sampling():
    """generation_config.json's settings apply if they ask for sampling; the user's come first."""
    nothing = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "repetition_penalty"))
    assert recommended({}, nothing) == Sampling()
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    assert recommended(own, nothing) == Sampling(temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    assert recommended({"do_sample": True}, nothing) == Sampling(temperature=1.0)
    assert recommended({**own, "do_sample": False}, nothing) == Sampling(repetition_penalty=1.1)
    assert recommended(own, {**nothing, "temperature": 0.0, "repetition_penalty": 1.0}).greedy


def test_the_terminal(stories, storyteller, monkeypatch, capsys):
    lines = iter(["", "Once upon \\", "a time", "/history", "/nonsense", "/reset", "/help", "/system Be kind.", "/history"])

    def typed(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    chat(str(stories), chat_template=TEMPLATE, max_new_tokens=8, dtype="float32")
    out, err = capsys.readouterr()
    want = "".join(Conversation(storyteller, Request(max_new_tokens=8)).ask("Once upon \na time"))
    assert out == want + "\n"
    assert "user: Once upon \na time" in err and f"assistant: {want}" in err
    assert "/nonsense is no command" in err and "/quit" in err and err.endswith("system: Be kind.\n")


def test_ctrl_c_stops_the_answer_and_not_the_chat(stories, monkeypatch, capsys):
    lines = iter(["Once", "/history", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    ask = Conversation.ask

    def interrupted(self, text):
        pieces = ask(self, text)
        yield next(pieces)
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", interrupted)
    chat(str(stories), chat_template=TEMPLATE, max_new_tokens=40, dtype="float32")
    out, err = capsys.readouterr()
    assert out.endswith(" ...\n") and "assistant: " in err
