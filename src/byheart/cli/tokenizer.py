"""`byheart tokenizer`."""

from pathlib import Path
from typing import Annotated

import typer

from byheart.cli.common import (
    FolderAsOption,
    SkipBadOption,
    SuffixOption,
    TextKeyOption,
    err_console,
    print_json,
    reading_options,
)
from byheart.data.documents import iter_documents
from byheart.data.tokenize import BpeTokenizer

group = typer.Typer(no_args_is_help=True, help="Train tokenizers.")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(group, name="tokenizer")


@group.command("train")
def train(
    documents: Annotated[Path, typer.Argument(help="JSON lines, text, or a folder.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    *,
    vocab_size: Annotated[int, typer.Option(min=257, help="Tokens at most.")] = 4096,
    folder_as: FolderAsOption = None,
    skip_bad: SkipBadOption = False,
    text_key: TextKeyOption = None,
    suffix: SuffixOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a byte-level BPE on documents; use it with --set data.tokenizer=DIR."""
    reader = iter_documents(documents, **reading_options(folder_as, skip_bad, text_key, suffix))
    err_console.print(
        f"Learning a BPE of {vocab_size:,} tokens from {documents} ...",
        markup=False,
        highlight=False,
    )
    tokenizer = BpeTokenizer.train((document.text for document in reader), vocab_size)
    tokenizer.save(out)
    if as_json:
        print_json(
            {
                "path": str(out),
                "vocab_size": tokenizer.vocab_size,
                "fingerprint": tokenizer.fingerprint,
            }
        )
    else:
        err_console.print(f"{tokenizer.vocab_size:,} tokens in {out}.", highlight=False)
