"""The console script `hone`: the operator's tool on the machine that holds HONE_HOME.

Commands act on the database and the files directly, so they work while the server runs or not;
customers use the HTTP API. Each group lives in `serve.commands` and imports what it needs when it
is called, so that `hone --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from data.errors import InvalidInput, NotFound, ToolkitError
from serve.commands import (
    access,
    accounts,
    content,
    demo,
    doctor,
    feedback,
    files,
    jobs,
    models,
    people,
    serve,
    tune,
    usage,
)

app = typer.Typer(
    name="hone",
    help="Fine-tune a language model per customer, and serve every customer's adapter.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("tune")(tune.tune)
app.command("usage")(usage.usage)
app.add_typer(accounts.accounts_app, name="accounts")
app.add_typer(access.app, name="access")
app.add_typer(content.app, name="content")
app.add_typer(accounts.keys_app, name="keys")
app.add_typer(accounts.admin_keys_app, name="admin-keys")
app.add_typer(feedback.app, name="feedback")
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(models.app, name="models")
app.add_typer(people.app, name="people")


def main() -> None:
    """Run the command line; errors of hone become one line on stderr and exit code 1 or 2."""
    try:
        app()
    except ToolkitError as error:
        print(f"hone: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InvalidInput | NotFound) else 1) from None


if __name__ == "__main__":
    main()
