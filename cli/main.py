"""The `longwave` command. A subcommand is one file of this folder and one name in SUBCOMMANDS
(import_.py is `import`: no module can have the name of a Python keyword).

That file has a docstring (its first line is the help), `add_arguments(parser)` and `run(args) -> int`, the
exit code. It imports what is slow or optional inside `run`: `longwave --help` is quick. Wrong arguments
are a `UsageError`, printed without a traceback; the exit code is 2.
"""

from __future__ import annotations

import argparse
import importlib
import keyword
import sys
from collections.abc import Sequence

from longwave.cli.usage import UsageError

SUBCOMMANDS = ("fetch", "show", "table", "reproduce", "generate", "perplexity", "import", "export", "check", "report")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longwave",
        description="Longwave: efficient sequence architectures in JAX. "
        "Training is `uv run train.py CONFIG.gin`; this command is for what surrounds it.",
        epilog="`longwave COMMAND --help` says what a command takes, with an example.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in SUBCOMMANDS:
        file = f"{name}_" if keyword.iskeyword(name) else name
        module = importlib.import_module(f"longwave.cli.{file}")
        summary, _, description = (module.__doc__ or "").partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\n{description}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, name=name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except UsageError as error:
        print(f"longwave {args.name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
