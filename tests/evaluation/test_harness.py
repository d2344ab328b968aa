import importlib
import json
import math
import sys

import pytest
import torch
from lm_eval.api.instance import Instance

from byheart.data.tokenize import BpeTokenizer, ByteTokenizer
from byheart.evaluation.harness import HarnessModel, evaluate_with_harness, find_tasks
from byheart.models.generate import generate

TOKENIZER = ByteTokenizer()
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
"""
QUESTIONS = [
    {"question": f"Which of {i} long words about rain?", "choices": ["a", "be", "see"], "label": i}
    for i in range(3)
]


def asked(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=index)
        for index, argument in enumerate(arguments)
    ]


@torch.no_grad()
def score(model, text, continuation, memory_size=None):
    """Read a text token by token, and add up what its last bytes cost."""
    ids = [256, *text.encode(), *continuation.encode()]
    state, total, greedy = model.new_state(1, memory_size=memory_size), 0.0, True
    for place, token in enumerate(ids[:-1]):
        out = model(torch.tensor([[token]]), state=state)
        state = state.commit(out.new_entries)
        if place >= len(ids) - 1 - len(continuation.encode()):
            total += float(out.logits[0, 0].double().log_softmax(-1)[ids[place + 1]])
            greedy &= int(out.logits[0, 0].argmax()) == ids[place + 1]
    return total, greedy


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Tasks of our own from local files, and no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in (("own_choice", CHOICE), ("own_rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(task.format(name=name, data=data))
    return folder


def test_answers_are_those_of_reading_token_by_token(reader):
    model = reader.train()
    requests = [
        ("a text that is longer than a segment", " yes"),
        ("short", " and a longer continuation"),
        ("a text that is longer than a segment", " no"),
        ("", "begins"),
        ("ends in spaces  ", "x"),
    ]
    lm = HarnessModel(model, TOKENIZER, rows=2)
    found = lm.loglikelihood(asked("loglikelihood", *requests))
    assert model.training
    model.eval()
    for (context, continuation), (total, greedy) in zip(requests, found, strict=True):
        expected, expected_greedy = score(model, context, continuation)
        # spaces at the end of a context belong to the continuation
        spaces = context[len(context.rstrip()) :]
        if spaces:
            expected, expected_greedy = score(model, context.rstrip(), spaces + continuation)
        assert total == pytest.approx(expected, abs=2e-3)
        assert greedy == expected_greedy
    texts = ["a whole text, read from its first byte", "b"]
    totals = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *[(text,) for text in texts]))
    for text, total in zip(texts, totals, strict=True):
        assert total == pytest.approx(score(model, "", text)[0], abs=4e-3)


def test_the_memory_size_is_that_asked_for(reader):
    model, text = reader, "a text that is much longer than a segment" * 3
    found = [
        HarnessModel(model, TOKENIZER, memory_size=size).loglikelihood(
            asked("loglikelihood", (text, " end"))
        )[0][0]
        for size in (0, 17)
    ]
    assert found[0] == pytest.approx(score(model, text, " end", 0)[0], abs=2e-3)
    assert abs(found[0] - found[1]) > 0.01


def test_generation_goes_on_to_its_stop_text_or_its_end(make_decoder):
    model = make_decoder()
    lm = HarnessModel(model, TOKENIZER)
    prompt = torch.tensor([[256, *b"It was"]])
    whole = TOKENIZER.decode(generate(model, prompt, max_new_tokens=40).tokens[0].tolist())
    stop = whole[20:22]
    (cut,) = lm.generate_until(
        asked("generate_until", ("It was", {"until": ["\0never", stop], "max_gen_toks": 40}))
    )
    assert cut == whole[: whole.index(stop)]
    (full,) = lm.generate_until(
        asked("generate_until", ("It was", {"until": "\0never", "max_gen_toks": 40}))
    )
    assert full == whole
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 2.0, "top_k": 50, "max_gen_toks": 20}
    first, second = lm.generate_until(asked("generate_until", *[("It was", options)] * 2))
    assert first != second


def test_the_harness_runs_tasks_and_counts(make_decoder, tasks):
    model = make_decoder()
    names = ["own_choice", "own_rolling"]
    manager = find_tasks(names, tasks)
    assert manager.all_tasks == names
    found = evaluate_with_harness(model, TOKENIZER, names, manager=manager, rows=2)
    rights = []
    for record in QUESTIONS:
        totals = [score(model, record["question"], f" {choice}")[0] for choice in record["choices"]]
        rights.append(totals.index(max(totals)) == record["label"])
    assert found["results"]["own_choice"]["acc,none"] == pytest.approx(sum(rights) / 3)
    nats = sum(score(model, "", record["question"])[0] for record in QUESTIONS)
    words = sum(len(record["question"].split()) for record in QUESTIONS)
    perplexity = found["results"]["own_rolling"]["word_perplexity,none"]
    assert math.log(perplexity) == pytest.approx(-nats / words, rel=1e-4)
    assert found["n-samples"]["own_choice"]["effective"] == 3


def test_unknown_tasks_and_a_missing_start_token_are_refused(make_decoder, tasks, tmp_path):
    manager = find_tasks(["own_choice"], tasks)
    with pytest.raises(ValueError, match=r"tasks must be names of lm-eval's tasks, got \['nope'\]"):
        evaluate_with_harness(make_decoder(), TOKENIZER, ["own_choice", "nope"], manager=manager)
    BpeTokenizer.train(["some words " * 30], 257).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|start|>", "<|other|>"))
    lm = HarnessModel(make_decoder(), BpeTokenizer.from_file(file))
    with pytest.raises(ValueError, match="tokenizer must have a start token"):
        lm.loglikelihood(asked("loglikelihood", ("", "begins")))


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "byheart.evaluation.harness")
    with pytest.raises(ImportError, match=r"needs EleutherAI's lm-eval.*byheart\[eval\]"):
        importlib.import_module("byheart.evaluation.harness")
