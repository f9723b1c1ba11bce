"""Commands on finished models: verify, show, report, diff."""

from __future__ import annotations

import secrets
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_immunize.commands.app import CODES, UNMET, UNSOUND, app, errors, say
from hf_immunize.errors import ConfigError

Target = Annotated[str, typer.Argument(help="A folder, or owner/name on the Hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print plain data for scripts.")]
PolicyFile = Annotated[Path | None, typer.Option("--policy", help="YAML file with what the certificate has to say.")]


@app.command(epilog=f"""Examples:\n
    hf-immunize verify owner/model --revision main --rejudge\n
    hf-immunize verify ./model --policy policy.yaml --trusted-key 3b6a... --json\n
    hf-immunize verify runs/digits-vit/condition_number --recheck 1 --base runs/digits-vit/base
    --task recipes/digits-vit/task.yaml\n
{CODES}""")
def verify(
    target: Target,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None,
    policy: PolicyFile = None,
    trusted_key: Annotated[
        str | None, typer.Option(help="Publisher's public key, hexadecimal or a file; its signature is required.")
    ] = None,
    checker_key: Annotated[
        list[str] | None, typer.Option(help="Public key of somebody whose signed rechecks you believe; may be repeated.")
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
    from hf_immunize.hub.tables import findings_table, outcome

    wanted = None if policy is None else Policy.read(policy)
    folder, found = verify_model(target, policy=wanted, revision=revision, trusted_key=trusted_key,
                                 checker_keys=checker_key or (), rejudge=rejudge)
    if recheck:
        if base is None or task is None:
            raise ConfigError("expected --base and --task with --recheck, got one or none: a certificate names its "
                              "base and its data, but holds neither.")
        from hf_immunize.stages.start import hush

        seed = secrets.randbelow(2**31) if recheck_seed is None else recheck_seed
        hush()
        with errors().status(f"attacking again, {recheck} cell(s), seed {seed}"):
            found = repeat_attacks(folder, found, base=base, task=task, cells=recheck, seed=seed, device=device)
    say(found.as_json() if as_json else outcome(found))
    if found.findings and not as_json:
        say(findings_table(found))
    if not found.ok:
        raise typer.Exit(UNMET if found.sound else UNSOUND)


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
    from hf_immunize.hub.tables import certificate_table, findings_table, outcome

    _, found = verify_model(target, revision=revision)
    if found.certificate is not None:
        say(found.certificate.model_dump(mode="json") if as_json else certificate_table(found.certificate))
    if not as_json or not found.sound:
        shown = errors() if as_json else Console()
        shown.print(outcome(found), soft_wrap=True)
        shown.print(findings_table(found))
    if not found.sound:
        raise typer.Exit(UNSOUND)


@app.command(epilog="""Examples:\n
    hf-immunize report runs/a runs/b --base runs/base --output report.html\n
    hf-immunize report ./model --open""")
def report(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders with certificate.json, one column each.")
    ] = None,
    model_paths: Annotated[list[Path] | None, typer.Option("--model_paths", help="The same, by its key.")] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", "--base_path", help="Folder of the base they were examined against, whose weights are "
                     "compared."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Page to write; report.html in the first folder.")
    ] = None,
    config: Annotated[list[Path] | None, typer.Option("--config", help="YAML file with these options.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write the page that compares a base with its immunized models: one file, no script, no network."""
    from hf_immunize.stages.report import main

    listed = [*(model_paths or []), *(folders or [])]
    words = [f"--config={file}" for file in config or []] + (["--model_paths", *map(str, listed)] if listed else [])
    words += [f"--{key}={value}" for key, value in (("base_path", base), ("output", output)) if value is not None]
    page = main(words, prog="hf-immunize report")
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
        say([{"what": what, "first": mine, "second": theirs} for what, mine, theirs in rows])
    else:
        say(differences_table(rows, (str(first), str(second))) if rows else "The two certificates say the same.")
    if rows:
        raise typer.Exit(1)
