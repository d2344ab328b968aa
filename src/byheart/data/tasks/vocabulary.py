"""A small vocabulary for models that learn the tasks from scratch."""

from byheart.data.tasks.config import TaskConfig
from byheart.data.tasks.facts import people_sentences, relation_stories, story_sentences
from byheart.data.tasks.stories_file import read_stories
from byheart.data.tasks.streams import read_background
from byheart.data.tokenize import BpeTokenizer

__all__ = ["train_task_tokenizer"]


def train_task_tokenizer(config: TaskConfig, vocab_size: int = 4096) -> BpeTokenizer:
    """Learn a byte-level BPE vocabulary for the tasks.

    It is learnt from the background to train on and from all sentences of all tasks, so that one
    tokenizer serves them all; of the usual 4,096 tokens one is each person, room and direction.

    Args:
        config: Whose background and file of `facts` to learn from, besides the templates.
        vocab_size: Tokens to learn at most, at least 257.

    Returns:
        The same tokenizer at every call.

    Raises:
        DataError: If the background or the file of facts cannot be used.
        ValueError: If `vocab_size` is below 257.
    """
    stories = relation_stories(None)
    if config.facts is not None:
        stories += read_stories(config.facts, num_facts=2)
    facts, questions = people_sentences()
    sentences = [*facts, *questions, *story_sentences(stories)]
    # without more stories, in which the words of the facts would be too rare to be tokens
    texts = read_background(config.background, "train")
    # words are learnt with the space before them, as they stand in documents
    return BpeTokenizer.train([*texts, "".join(f" {s}" for s in sentences)], vocab_size)
