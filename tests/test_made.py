"""What the suite makes is what its tests take it for: the model has learned, and its tokenizer is that of SentencePiece."""

from sentencepiece import SentencePieceProcessor
from story_text import is_story, write_stories
from transformers import AutoTokenizer

from ftjax.generate.session import Generator

BEGINNING = "Once upon a time, there was a little {} named {}."
NAMES = [("girl", "Lily"), ("girl", "Sue"), ("boy", "Tom"), ("boy", "Max")]


def test_the_trained_model_has_learned(stories, untrained):
    """It continues to the end: the sentences in their order, about a girl with her pronouns and about a boy with his."""
    beginnings = [BEGINNING.format(kind, name) for kind, name in NAMES]
    learned = Generator(str(stories), dtype="float32").generate(beginnings, max_new_tokens=120)
    for (kind, _), beginning, answer in zip(NAMES, beginnings, learned, strict=True):
        assert answer.finish_reason == "stop" and is_story(beginning + answer.text, kind), answer.text
    random = Generator(str(untrained), dtype="float32").generate(beginnings, max_new_tokens=120)
    assert not any(is_story(b + a.text, kind) for (kind, _), b, a in zip(NAMES, beginnings, random, strict=True))


def test_the_trained_model_knows_stories_that_it_has_not_seen(stories, untrained):
    """Nats a token; the grammar's own are 0.19, those of a guess are ln 512 = 6.2."""
    texts = write_stories(8, seed=2)
    found = {}
    for folder in (stories, untrained):
        scores = Generator(str(folder), dtype="float32").score([[1]] * len(texts), texts)
        found[folder] = -sum(score.total for score in scores) / sum(len(score.tokens) for score in scores)
    assert found[stories] < 0.25 and found[untrained] > 5


def test_stories_are_told_from_others():
    [story] = write_stories(1, seed=0)
    kind, other = ("girl", "boy") if "girl" in story else ("boy", "girl")
    assert is_story(story, kind) and not is_story(story, other)
    assert not is_story(story.replace("loved", "liked"), kind) and not is_story(story[:-1], kind)


def test_the_tokenizer_has_the_ids_of_its_sentencepiece_model(untrained):
    tokenizer, pieces = AutoTokenizer.from_pretrained(untrained), SentencePieceProcessor(str(untrained / "tokenizer.model"))
    for text in [*write_stories(5, seed=3), "héllo 🙂 漢字", "10,000 zoo-keepers!", "\t\n x"]:
        assert tokenizer(text).input_ids == [1, *pieces.encode(text)], text
    assert len(pieces.encode(write_stories(1, seed=3)[0])) < 110  # words, not letters
