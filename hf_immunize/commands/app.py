"""The ``hf-immunize`` command: its group, its exit codes, and how it prints."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hf_immunize.commands.verbs import STAGES
from hf_immunize.errors import HubError, ImmunizeError, PolicyUnmetError, PublishRefusedError, VerificationError

if TYPE_CHECKING:
    from rich.console import Console

UNSOUND, UNMET, NO_HUB = 3, 4, 5
CODES = "Exit codes: 0 done, 1 error, 2 usage, 3 files that are not what the certificate says, 4 policy, 5 the Hub."


class Stage(TyperCommand):
    """A verb whose words, ``--help`` among them, are read by its stage."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Leave every word to the stage."""
        rest = list(args)
        ctx.args = rest
        return rest

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Flags of the stage, and names of presets; a shell offers files where nothing fits."""
        from hf_immunize.commands.completion import offered

        # newer releases of typer bring click along under a name of their own, older ones use it as it is
        core = next(kind.__module__ for kind in TyperCommand.__mro__ if kind.__name__ == "Command")
        item = import_module(f"{core.rpartition('.')[0]}.shell_completion").CompletionItem
        return [item(word) for word in offered(self.name or "", incomplete)]

    def invoke(self, ctx: Any) -> Any:
        """Run the stage; a number that it returns is an exit code."""
        code = import_module(f"hf_immunize.stages.{self.name}").main(ctx.args, prog=f"hf-immunize {self.name}")
        if code:
            raise typer.Exit(code)


class _Quiet(TyperGroup):
    """Errors as one message on stderr; tracebacks only with --debug."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        stages = {name: Stage(name, help=told, add_help_option=False) for name, told in STAGES.items()}
        self.commands = stages | dict(self.commands)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except ImmunizeError as error:
            if ctx.params.get("debug"):
                raise
            errors().print(f"{type(error).__name__}: {error}", style="red")
            raise typer.Exit(_code_of(error)) from None
        except (ImportError, OSError, ValueError, RuntimeError, TypeError, LookupError) as error:
            if ctx.params.get("debug"):
                raise
            errors().print(f"Unexpected {type(error).__name__}: {error}. --debug shows where.", style="red")
            raise typer.Exit(1) from None


def _code_of(error: ImmunizeError) -> int:
    if isinstance(error, HubError):
        return NO_HUB
    if isinstance(error, PolicyUnmetError):
        return UNMET
    return UNSOUND if isinstance(error, VerificationError | PublishRefusedError) else 1


app = typer.Typer(
    cls=_Quiet, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help=f"Immunize models, attack and certify them; publish, verify and read what came of it.\n\n{CODES}",
)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    pass


def say(what: Any) -> None:
    """Print data as JSON, a table as a table, and text as it is."""
    from rich.console import Console  # a third of the time that --help would take
    from rich.text import Text

    if isinstance(what, dict | list):
        sys.stdout.write(json.dumps(what, indent=1, ensure_ascii=False) + "\n")
    else:
        Console(soft_wrap=isinstance(what, str | Text)).print(what, markup=False, highlight=False)


def errors() -> Console:
    """Where errors and hints go."""
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
