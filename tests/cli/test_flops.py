"""`byheart flops` and `byheart reproduce flops` from the outside."""

import json
import sys

import pytest

from byheart.cli.reproduce import FIGURES
from byheart.cli.reproduce_flops import PUBLISHED_RATIOS

RATIOS = {
    "opt-125m": 295.066,
    "opt-1.3b": 154.416,
    "opt-6.7b": 81.649,
    "opt-30b": 48.385,
    "opt-175b": 29.015,
}


@pytest.fixture
def results(command):
    def run(*arguments):
        code, out, err = command("flops", "--json", *arguments)
        assert code == 0, err
        return json.loads(out)["results"]

    return run


def test_flops_gives_the_ratios_of_the_report(results):
    found = {
        item["model"]: item["ratio"] for item in results("--tokens", 2_048_000, "--segment", 512)
    }
    assert found == pytest.approx(RATIOS, abs=1e-3)


def test_models_and_lengths_can_be_chosen(results):
    items = results("--model", "opt-125m", "--model", "GPT2", "--tokens", "1000,2K")
    assert [(item["model"], item["tokens"]) for item in items] == [
        ("opt-125m", 1000), ("opt-125m", 2048), ("gpt2", 1000), ("gpt2", 2048),
    ]  # fmt: skip
    assert [item["segments"] for item in items] == [2, 4, 2, 4]


def test_a_config_file_is_a_model(results, tmp_path):
    config = {
        "model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50_257,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    (mine,), (named,) = results("--model", path), results("--model", "gpt2")
    assert mine["full_attention_terms"] == named["full_attention_terms"]
    assert mine["ratio"] == named["ratio"]


def test_widths_can_be_set(results):
    (item,) = results("--model", "opt-125m", "--set", "num_layers=24")
    (plain,) = results("--model", "opt-125m")
    assert item["shape"]["num_layers"] == 24
    assert item["recurrent_terms"]["scores"] == 2 * plain["recurrent_terms"]["scores"]


def test_honest_counts_memory(command):
    honest = ["flops", "--convention", "honest", "--model", "gpt2", "--json"]
    found = []
    for options in (
        ["--num-memory-tokens", 0],
        [],
        ["--memory-size", "8K"],
        ["--memory-size", "64K", "--top-k", 64, "--memory-layers", 2],
    ):
        code, out, err = command(*honest, *options)
        assert code == 0, err
        found.append(json.loads(out))
    totals = [item["results"][0]["recurrent_flops"] for item in found]
    assert totals == sorted(set(totals))
    assert found[1]["settings"]["num_memory_tokens"] == 10
    assert found[3]["settings"]["knn_memory"] == {
        "memory_size": 65_536, "top_k": 64, "num_layers": 2,
    }  # fmt: skip


def test_the_formula_can_be_varied(results):
    (item,) = results("--model", "opt-125m", "--softmax-flops", 3, "--vocab-matmuls", 2)
    assert item["ratio"] == pytest.approx(223.4, abs=0.05)


def test_the_table_fits_a_terminal(command):
    code, out, _ = command("flops", columns=80)
    assert code == 0
    assert "convention report, segments of 512" in out
    assert "1.61e+17 5.46e+14 295.066" in out
    code, out, _ = command("flops", "--convention", "honest", columns=80)
    assert code == 0
    assert "without" in out
    assert out.splitlines()[-1].split() == [
        "opt-175b", "2,048,000", "1.07e+19", "7.46e+17", "14.362", "14.407", "5.23e+12", "3.64e+11",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--convention", "mine"], "--convention must be report or honest, got 'mine'"),
        (["--model", "opt-125"], "Did you mean opt-125m?"),
        (["--tokens", "many"], "Sizes must be whole numbers"),
        (["--tokens", "0"], "num_tokens must be at least 1"),
        (["--segment", "0"], "--segment"),
        (["--set", "layers=2"], "layers"),
        (["--num-memory-tokens", "4"], "needs --convention honest"),
        (["--memory-size", "8K"], "needs --convention honest"),
        (["--memory-size", "1,2"], "must be one size, got '1,2'"),
        (["--top-k", "4"], "no effect without --memory-size"),
        (["--convention", "honest", "--memory-size", "16"], "top_k must be between 1 and"),
        (
            ["--convention", "honest", "--memory-size", "8K", "--memory-layers", "13"],
            "among the 12 layers of opt-125m",
        ),
    ],
)
def test_wrong_usage_is_code_2(command, arguments, message):
    code, out, err = command("flops", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_config_without_a_width_is_code_1_and_names_the_key(command, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2", "n_embd": 8, "n_head": 2, "vocab_size": 9}')
    code, out, err = command("flops", "--model", path)
    assert (code, out) == (1, "")
    assert "num_layers as num_hidden_layers or n_layer" in err


def test_reproduce_writes_result_table_and_figure(command, tmp_path):
    out_dir = tmp_path / "new" / "flops"
    code, out, err = command("reproduce", "flops", "--quick", "--out", out_dir)
    assert code == 0, err
    assert "| opt-125m | 295.066 | 295.066 |" in out
    assert (out_dir / "flops.md").read_text() in out
    assert (out_dir / "flops.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((out_dir / "flops.json").read_text())
    assert result["agrees"] is True
    assert {item["model"]: item["ratio"] for item in result["models"]} == pytest.approx(
        RATIOS, abs=1e-3
    )
    assert [point["segments"] for point in result["models"][0]["curve"]][-1] == 4000


def test_reproduce_compares_with_a_file(command, tmp_path):
    paper = tmp_path / "paper.json"
    ratios = {name.upper(): ratio for name, ratio in PUBLISHED_RATIOS.items()}
    arguments = ["reproduce", "flops", "--no-plot", "--json", "--out", tmp_path, "--paper", paper]

    def write(content):
        paper.write_text(json.dumps({"fig3_ratio_to_rmt_at_4000_segments": content}))

    write(ratios)
    code, out, _ = command(*arguments)
    assert code == 0
    assert json.loads(out)["files"] == [str(tmp_path / "flops.json"), str(tmp_path / "flops.md")]
    write({**ratios, "OPT-30B": 48.0})
    code, out, err = command(*arguments)
    assert code == 1
    assert json.loads(out)["agrees"] is False
    assert "not those of opt-30b" in err
    write({"OPT-30B": 48.0})
    code, _, err = command(*arguments)
    assert code == 1
    assert "none for opt-125m, opt-1.3b, opt-6.7b, opt-175b" in err
    paper.write_text("[]")
    code, _, err = command(*arguments)
    assert code == 1
    assert "must be a JSON object with ratios by model" in err


def test_reproduce_without_matplotlib_leaves_out_the_figure(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = command("reproduce", "flops", "--out", tmp_path)
    assert code == 0
    assert "No plot: Plots need the matplotlib package" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flops.json", "flops.md"]


def test_reproduce_lists_its_figures(command):
    code, out, _ = command("reproduce", "--help")
    assert code == 0
    assert all(name in out for name in FIGURES)
