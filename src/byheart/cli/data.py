"""`byheart data`."""

from pathlib import Path
from typing import Annotated

import typer

from byheart.cli.common import (
    FolderAsOption,
    SkipBadOption,
    SuffixOption,
    TextKeyOption,
    print_json,
    reading_options,
    tokenize_progress,
)
from byheart.data.stats import CorpusStats, corpus_stats
from byheart.data.token_cache import tokenize_corpus
from byheart.data.tokenize import load_tokenizer

group = typer.Typer(no_args_is_help=True, help="Look at documents.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(group, name="data")


@group.command("stats")
def stats(
    documents: Annotated[Path, typer.Argument(help="JSON lines, text, or a folder.")],
    *,
    tokenizer: Annotated[str, typer.Option(help="bytes, or the path of a tokenizer.")] = "bytes",
    segment_length: Annotated[int, typer.Option(min=1, help="Tokens per segment.")] = 512,
    folder_as: FolderAsOption = None,
    skip_bad: SkipBadOption = False,
    text_key: TextKeyOption = None,
    suffix: SuffixOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Count documents and tokens, and say how much lies in long documents."""
    reading = reading_options(folder_as, skip_bad, text_key, suffix)
    with tokenize_progress() as on_progress:
        corpus = tokenize_corpus(
            documents, load_tokenizer(tokenizer), on_progress=on_progress, **reading
        )
    result = corpus_stats(corpus, segment_length=segment_length)
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)


def _show(result: CorpusStats) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    rows = [
        ("documents", f"{result.num_documents:,}"),
        ("tokens", f"{result.num_tokens:,}"),
        ("bytes", f"{result.num_bytes:,}"),
        ("bytes per token", f"{result.bytes_per_token:.2f}"),
        *(
            (f"length, {item.percent} % are shorter", f"{item.tokens:,}")
            for item in result.length_percentiles
        ),
        *(
            (f"tokens in documents over {item.longer_than_tokens:,}", f"{item.token_share:.1%}")
            for item in result.length_shares
        ),
        (f"padding in segments of {result.segment_length}", f"{result.padding_share:.1%}"),
    ]
    for row in rows:
        table.add_row(*row)
    Console().print(table)
