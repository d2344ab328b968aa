"""`byheart evaluate --suite`: probes of memory, and tasks of lm-eval."""

import json

import pytest

TASK = """
task: own
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


def test_probes_write_table_and_json(command, run_dir, documents, tmp_path):
    code, out, err = command(
        "evaluate", run_dir, documents, "--suite", "multi-key", "--keys", "3", "--lengths",
        "300,1K", "--samples", "2", "--memory-size", "0,64", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "Accuracy of multi-key (2 texts each, chance 33.3%)" in out
    assert "| 1,024 | 64 |" in out
    result = json.loads((tmp_path / "multi-key.json").read_text())
    assert [(m["num_tokens"], m["memory_size"]) for m in result["measurements"]] == [
        (300, 0), (300, 64), (1024, 0), (1024, 64),
    ]  # fmt: skip
    assert result["settings"]["background"] == str(documents)
    assert (tmp_path / "multi-key.md").read_text() in out


def test_babi_reads_its_own_files(command, run_dir, tmp_path):
    stories = tmp_path / "qa1_test.txt"
    stories.write_text(
        "1 Mary went to the hall.\n2 Where is Mary?\thall\t1\n"
        "1 John went home.\n2 Where is John?\thome\t1\n"
    )
    code, out, err = command(
        "evaluate", run_dir, "--suite", "babi", "--stories", stories, "--lengths", "200",
        "--samples", "3", "--json",
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert result["chance"] == 0.5
    assert len(result["measurements"][0]["outcomes"]) == 3
    assert result["measurements"][0]["memory_size"] == 128


def test_tasks_of_the_harness(command, run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    data = tmp_path / "questions.jsonl"
    records = [{"question": "Why?", "choices": ["so", "no"], "label": i} for i in (0, 1, 0)]
    data.write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(TASK.format(data=data))
    code, out, err = command(
        "evaluate", run_dir, "--suite", "lm-eval", "--tasks", "own", "--include-path",
        tmp_path / "tasks", "--limit", "2", "--memory-size", "0,64", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "Memory size 64" in out
    result = json.loads((tmp_path / "lm-eval.json").read_text())
    assert [m["memory_size"] for m in result["measurements"]] == [0, 64]
    assert result["measurements"][0]["results"]["own"]["acc,none"] == 0.5
    assert result["measurements"][0]["n-samples"]["own"]["effective"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--lengths", "512"], 2, "--suite perplexity has no use for --lengths"),
        (["--suite", "passkey", "--keys", "3"], 2, "--suite passkey has no use for --keys"),
        (
            ["--suite", "passkey", "--max-tokens", "9", "--xl-cache", "both"], 2,
            "--suite passkey has no use for --max-tokens, --xl-cache",
        ),
        (["--suite", "babi"], 2, "--suite babi needs --stories"),
        (["--suite", "lm-eval"], 2, "--suite lm-eval needs --tasks"),
        (["DOCUMENTS", "--suite", "lm-eval", "--tasks", "own"], 2, "has no use for DOCUMENTS"),
        (["--suite", "passkey", "--lengths", "many"], 2, "must be whole numbers such as"),
        (["--suite", "passkey", "--lengths", "50"], 1, "num_tokens must be at least 98"),
        (
            ["--suite", "babi", "--stories", "nope.txt"], 1,
            "Stories must be in an existing file, JSON lines or bAbI's own, got 'nope.txt'",
        ),
        (
            ["--suite", "lm-eval", "--tasks", "own,wikitext,no-such", "--include-path", "TASKS"], 1,
            "tasks must be names of lm-eval's tasks, got ['no-such']",
        ),
        (["--suite", "needle"], 2, "needle"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    command, run_dir, documents, tmp_path, arguments, code, problem
):
    (tmp_path / "own.yaml").write_text(TASK.format(data="questions.jsonl"))
    paths = {"DOCUMENTS": documents, "TASKS": tmp_path}
    arguments = [paths.get(one, one) for one in arguments]
    got, out, err = command("evaluate", run_dir, *arguments)
    assert got == code
    assert problem in err
    assert not out
