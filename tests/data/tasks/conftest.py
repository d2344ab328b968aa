"""A tokenizer that splits like BERT's, and small backgrounds."""

import json

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, pre_tokenizers

from byheart.data.tasks.facts import (
    people_sentences,
    relation_stories,
    story_sentences,
    stranger_sentences,
)
from byheart.data.tokenize import BpeTokenizer


@pytest.fixture(scope="session")
def article():
    """The last word of one copy and the first of the next make one word."""
    return "Who sings ? Birds sing , whales sing ; some say the stars sing too and so it ends"


@pytest.fixture(scope="session")
def words(article):
    """Words and punctuation marks are tokens, wherever they stand."""
    facts, questions = people_sentences()
    texts = [*facts, *questions, *story_sentences(relation_stories(None)), article, "endsWho very"]
    texts += [" ".join(f"w{i}" for i in range(400)), *stranger_sentences()]
    splitter = pre_tokenizers.BertPreTokenizer()
    found = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    vocab = {word: i for i, word in enumerate(["[UNK]", *found])}
    tokenizer = HuggingFaceTokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = splitter
    return BpeTokenizer(tokenizer.to_str())


@pytest.fixture
def write_lines(tmp_path):
    def write(*records, name="lines.jsonl"):
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def numbered(write_lines):
    """Four stories in which each of the words w0 ... w399 stands once."""
    stories = [range(40), range(40, 150), range(150, 155), range(155, 400)]
    return write_lines(*({"text": " ".join(f"w{i}" for i in story)} for story in stories))
