"""``hf-immunize``: publish, verify and read certified models. It never trains."""

from __future__ import annotations

import json
import secrets
import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from hf_immunize.errors import (
    ConfigError,
    HubError,
    ImmunizeError,
    PolicyUnmetError,
    PublishRefusedError,
    VerificationError,
)

UNSOUND, UNMET, NO_HUB = 3, 4, 5

_CODES = "Exit codes: 0 done, 1 error, 2 usage, 3 files that are not what the certificate says, 4 policy, 5 the Hub."


class _Quiet(TyperGroup):
    """Errors as one message on stderr; tracebacks only with --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except ImmunizeError as error:
            if ctx.params.get("debug"):
                raise
            _errors().print(f"{type(error).__name__}: {error}", style="red")
            raise typer.Exit(_code_of(error)) from None
        except (OSError, ValueError, RuntimeError, TypeError, LookupError) as error:
            if ctx.params.get("debug"):
                raise
            _errors().print(f"Unexpected {type(error).__name__}: {error}. --debug shows where.", style="red")
            raise typer.Exit(1) from None


def _code_of(error: ImmunizeError) -> int:
    if isinstance(error, HubError):
        return NO_HUB
    if isinstance(error, PolicyUnmetError):
        return UNMET
    return UNSOUND if isinstance(error, VerificationError | PublishRefusedError) else 1


app = typer.Typer(
    cls=_Quiet, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help=f"Publish, verify and read certified immunized models.\n\n{_CODES}",
)

Target = Annotated[str, typer.Argument(help="A folder, or owner/name on the Hub.")]
Folder = Annotated[Path, typer.Argument(help="Folder with certificate.json.", exists=True, file_okay=False)]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="YAML file with what the certificate has to say.")]
Json = Annotated[bool, typer.Option("--json", help="Print plain data for scripts.")]
Licence = Annotated[str | None, typer.Option("--license", help="Licence identifier of the Hub, e.g. apache-2.0.")]
BaseModel = Annotated[str | None, typer.Option("--base-model", help="Hub id of the base.")]
Dataset = Annotated[list[str] | None, typer.Option("--dataset", help="Hub id of a data set; may be repeated.")]
Task = Annotated[str | None, typer.Option("--pipeline-tag", help="Task of the model on the Hub.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    pass


@app.command(epilog=f"""Examples:\n
    hf-immunize verify owner/model --revision main --rejudge\n
    hf-immunize verify ./model --policy policy.yaml --trusted-key 3b6a... --json\n
    hf-immunize verify runs/digits-vit/condition_number --recheck 1 --base runs/digits-vit/base
    --task recipes/digits-vit/task.yaml\n
{_CODES}""")
def verify(
    target: Target,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    policy: PolicyFile = None,
    trusted_key: Annotated[
        str | None, typer.Option(help="Publisher's public key, hexadecimal or a file; its signature is required.")
    ] = None,
    rejudge: Annotated[bool, typer.Option("--rejudge", help="Also recompute every verdict from the traces.")] = False,
    recheck: Annotated[
        int, typer.Option(help="Attack again: this many random cells, whose results are compared with the stored "
                          "intervals. Needs --base and --task; takes as long as these attacks.", min=0)
    ] = 0,
    base: Annotated[str | None, typer.Option(help="For --recheck: folder or Hub id of the base.")] = None,
    task: Annotated[Path | None, typer.Option(help="For --recheck: YAML file with the exam's data options.")] = None,
    recheck_seed: Annotated[int | None, typer.Option(help="Which cells are drawn; another draw by default.")] = None,
    device: Annotated[str, typer.Option(help="For --recheck: cpu, cuda or mps.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Check hashes, schema, expiry, signature, card and policy of a published model; on request, its attacks too."""
    from hf_immunize.hub import Policy, repeat_attacks, verify_model
    from hf_immunize.hub.tables import findings_table

    wanted = None if policy is None else Policy.read(policy)
    folder, found = verify_model(target, policy=wanted, revision=revision, trusted_key=trusted_key,
                                 rejudge=rejudge)
    if recheck:
        if base is None or task is None:
            raise ConfigError("expected --base and --task with --recheck, got one or none: a certificate names its "
                              "base and its data, but holds neither.")
        seed = secrets.randbelow(2**31) if recheck_seed is None else recheck_seed
        _hush()
        with _errors().status(f"attacking again, {recheck} cell(s), seed {seed}"):
            found = repeat_attacks(folder, found, base=base, task=task, cells=recheck, seed=seed, device=device)
    _print(found.as_json() if as_json else findings_table(found))
    if not found.ok:
        raise typer.Exit(UNMET if found.sound else UNSOUND)


@app.command(epilog=f"""Examples:\n
    hf-immunize publish runs/digits-vit/model owner/model --dry-run\n
    hf-immunize publish ./model owner/model --private --license apache-2.0 --base-model owner/base\n
    hf-immunize publish ./model owner/model --pr --allow-failed\n
{_CODES}""")
def publish(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub; created when it does not exist.")],
    policy: PolicyFile = None,
    allow_failed: Annotated[
        bool, typer.Option("--allow-failed", help="Publish although the verdicts do not meet the policy; the card "
                           "opens with what failed. Nothing lets out a model without its certificate.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="New repository is private; a public one is refused.")]
    = False,
    branch: Annotated[str | None, typer.Option(help="Commit to this branch.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go; the network is not asked.")] = False,
    sign_key: Annotated[Path | None, typer.Option(help="Private key (see keygen) that signs the certificate.")] = None,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Title of the commit.")] = None,
    license_: Licence = None,
    base_model: BaseModel = None,
    dataset: Dataset = None,
    pipeline_tag: Task = None,
    as_json: Json = False,
) -> None:
    """Publish a certified model in one commit. The token is the one of 'hf auth login' or HF_TOKEN."""
    from hf_immunize.hub import Policy
    from hf_immunize.hub.publish import publish as send

    done = send(
        folder, repo_id, policy=None if policy is None else Policy.read(policy), allow_failed=allow_failed,
        private=private or None, branch=branch, create_pr=pr, dry_run=dry_run, signing_key=sign_key, message=message,
        card=_card_options(folder, repo_id, license_, base_model, dataset, pipeline_tag),
    )
    if as_json:
        _print(done.as_json())
    else:
        _tell(done)


def _tell(done: Any) -> None:
    """What was published, file by file."""
    from hf_immunize.hub.tables import files_table

    what = "would go" if done.dry_run else "published"
    rows = [(name, size, what) for name, size in done.files.items()]
    _print(files_table([*rows, *((name, -1, "stays here") for name in done.left_out),
                        *((name, -1, "deleted there") for name in done.deleted)]))
    if done.dry_run:
        _print(f"Dry run: {len(done.files)} files would go to {done.repo_id}; nothing was sent.")
        return
    _print(f"Published: {done.pull_request or done.url}")
    if not done.confirmed:
        _print(f"The commit stands, but could not be read back: run hf-immunize verify {done.repo_id} "
               f"--revision {done.revision}")


@app.command(epilog="""Example:\n
    hf-immunize card ./model --repo-id owner/model --license apache-2.0""")
def card(
    folder: Folder,
    repo_id: Annotated[str | None, typer.Option(help="owner/name for the loading snippet.")] = None,
    license_: Licence = None,
    base_model: BaseModel = None,
    dataset: Dataset = None,
    pipeline_tag: Task = None,
    stdout: Annotated[bool, typer.Option("--stdout", help="Print the card instead of writing README.md.")] = False,
) -> None:
    """Write the model card from the certificate."""
    from hf_immunize.hub import render_card, write_card

    options = _card_options(folder, repo_id, license_, base_model, dataset, pipeline_tag)
    if stdout:
        sys.stdout.write(render_card(folder, options))
    else:
        _print(f"Wrote {write_card(folder, options)}")


@app.command(epilog="""Examples:\n
    hf-immunize show ./model\n
    hf-immunize show owner/model --revision v1 --json""")
def show(
    target: Target,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a certificate says, and whether the files beside it are the examined ones."""
    from hf_immunize.hub import verify_model
    from hf_immunize.hub.tables import certificate_table, findings_table

    _, found = verify_model(target, revision=revision)
    if found.certificate is not None:
        _print(found.certificate.model_dump(mode="json") if as_json else certificate_table(found.certificate))
    if not as_json or not found.sound:
        (_errors() if as_json else Console()).print(findings_table(found))
    if not found.sound:
        raise typer.Exit(UNSOUND)


@app.command(epilog="""Examples:\n
    hf-immunize report runs/a runs/b --base runs/base --output report.html\n
    hf-immunize report ./model --open""")
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders with certificate.json, one column each.")],
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base they were examined against, whose weights are compared.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", help="Page to write; report.html in the first folder.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write the page that compares a base with its immunized models: one file, no script, no network."""
    from hf_immunize.report import render_report

    page = render_report(folders, base, output or folders[0] / "report.html")
    _print(f"Wrote {page}")
    if open_page:
        webbrowser.open(page.resolve().as_uri())


@app.command(epilog="""Example:\n
    hf-immunize diff runs/before runs/after/certificate.json""")
def diff(
    first: Annotated[Path, typer.Argument(help="Folder or certificate.json.")],
    second: Annotated[Path, typer.Argument(help="Folder or certificate.json.")],
    as_json: Json = False,
) -> None:
    """Show what differs between two certificates. Exit code 1 when something does, as with diff."""
    from hf_immunize.hub.compare import compare_certificates, read_certificate
    from hf_immunize.hub.tables import differences_table

    rows = compare_certificates(read_certificate(first), read_certificate(second))
    if as_json:
        _print([{"what": what, "first": mine, "second": theirs} for what, mine, theirs in rows])
    else:
        _print(differences_table(rows, (str(first), str(second))) if rows else "The two certificates say the same.")
    if rows:
        raise typer.Exit(1)


@app.command(epilog="""Example:\n
    hf-immunize keygen signing.pem""")
def keygen(path: Annotated[Path, typer.Argument(help="File for the private key; must not exist.")]) -> None:
    """Make an Ed25519 key to sign certificates with; prints the public key to give to users."""
    from hf_immunize.hub.signature import make_key

    _print(make_key(path))


def _card_options(
    folder: Path, repo_id: str | None, license_: str | None, base_model: str | None, datasets: list[str] | None,
    pipeline_tag: str | None,
) -> Any:
    """What the folder's own card says, overridden by what was given here."""
    import dataclasses

    from hf_immunize.hub.release import card_options

    given = {
        "repo_id": repo_id, "license": license_, "base_model": base_model, "datasets": datasets or None,
        "pipeline_tag": pipeline_tag,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    return dataclasses.replace(card_options(folder), **chosen)


def _hush() -> None:
    """The libraries' own progress bars and warnings about each other."""
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)


def _print(what: Any) -> None:
    if isinstance(what, dict | list):
        sys.stdout.write(json.dumps(what, indent=1, ensure_ascii=False) + "\n")
    else:
        Console(soft_wrap=isinstance(what, str)).print(what, markup=False, highlight=False)


def _errors() -> Console:
    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
