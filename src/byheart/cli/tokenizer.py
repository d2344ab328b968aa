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
    prepare_output,
    print_json,
    reading_options,
)
from byheart.data.documents import iter_documents
from byheart.data.tokenize import BpeTokenizer

# by these names a tokenizer is found, the second before the first
_BPE_FILE, _BYTE_FILE = "tokenizer.json", "byte_tokenizer.json"

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
    overwrite: Annotated[
        bool, typer.Option(help="Replace the tokenizer that --out holds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a byte-level BPE on documents; use it with --set data.tokenizer=DIR."""
    reading = reading_options(folder_as, skip_bad, text_key, suffix)
    _require_free(out, overwrite=overwrite)
    reader = iter_documents(documents, **reading)
    prepare_output(out)
    err_console.print(
        f"Learning a BPE of {vocab_size:,} tokens from {documents} ...",
        markup=False,
        highlight=False,
    )
    tokenizer = BpeTokenizer.train((document.text for document in reader), vocab_size)
    tokenizer.save(out)
    (out / _BYTE_FILE).unlink(missing_ok=True)
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


def _require_free(out: Path, *, overwrite: bool) -> None:
    found = [name for name in (_BPE_FILE, _BYTE_FILE) if (out / name).exists()]
    if found and not overwrite:
        msg = (
            f"{out} must not hold a tokenizer already, found {found[0]}. Replace it with "
            "--overwrite, or choose another directory."
        )
        raise typer.BadParameter(msg)
