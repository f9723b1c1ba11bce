"""Commands on finished models: verify, show, report, diff, compare, leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_immunize.commands.app import CODES, UNMET, UNSOUND, app, errors, say
from hf_immunize.errors import ConfigError

Target = Annotated[str, typer.Argument(help="A folder, or owner/name on the Hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print plain data for scripts.")]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", help="A ready policy (research, release, strict) or a YAML file.")
]


Targets = Annotated[list[str], typer.Argument(help="Folders, or owner/name on the Hub.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
Rejudge = Annotated[bool, typer.Option("--rejudge", help="Also judge again from the traces, and compare every field.")]
TrustedKey = Annotated[
    str | None, typer.Option(help="Publisher's public key, hexadecimal or a file; its signature is required.")
]
CheckerKey = Annotated[
    list[str] | None, typer.Option(help="Public key of somebody whose signed rechecks you believe; repeatable.")
]
RecheckCount = Annotated[
    int, typer.Option(help="Attack again: this many random trials, whose curves are compared with the certified ones "
                      "at every evaluation. Takes as long as these attacks.", min=0)
]
ReattackCount = Annotated[
    int, typer.Option(help="Look for stronger attacks: this many, with settings and seeds drawn at random, on the "
                      "model and on its base; the strongest is reported.", min=0)
]
Base = Annotated[
    str | None, typer.Option(help="Folder or Hub id of the base; its weights must be the certificate's control. By "
                             "default the one that the card names, where it is needed.")
]
TaskFile = Annotated[
    Path | None, typer.Option(help="For repeated attacks: YAML file with the exam's data options; by default those in "
                              "the certificate.")
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the draw of trials and settings; a new one each time by default. Do not "
                             "use one that the publisher proposes.")
]
RecordFolder = Annotated[
    Path | None, typer.Option(help="For --recheck: folder below which the signed record is written, to be published "
                              "beside the certificate.")
]
SignKey = Annotated[
    Path | None, typer.Option(help="For --record: private key; by default the one of 'hf-immunize keygen'.")
]
Device = Annotated[str, typer.Option(help="For attacks: cpu, cuda or mps.")]


@app.command(epilog=f"""Examples:\n
    hf-immunize verify owner/model --revision main --rejudge\n
    hf-immunize verify ./model --policy release --trusted-key 3b6a... --json\n
    hf-immunize verify runs/digits-vit/condition_number --recheck 3 --base runs/digits-vit/base
    --task recipes/digits-vit/task.yaml\n
{CODES}""")
def verify(
    target: Target, revision: Revision = None, policy: PolicyFile = None, trusted_key: TrustedKey = None,
    checker_key: CheckerKey = None, rejudge: Rejudge = False, recheck: RecheckCount = 0, reattack: ReattackCount = 0,
    base: Base = None, task: TaskFile = None, recheck_seed: Seed = None, record: RecordFolder = None,
    sign_key: SignKey = None, device: Device = "cpu", as_json: Json = False,
) -> None:
    """Check hashes, schema, expiry, signature, card and policy of a published model; on request, its attacks too."""
    from hf_immunize.hub import Policy, verify_model
    from hf_immunize.hub.tables import findings_table, outcome

    wanted = None if policy is None else Policy.read(policy)
    folder, found = verify_model(target, policy=wanted, revision=revision, trusted_key=trusted_key,
                                 checker_keys=checker_key or (), rejudge=rejudge)
    if base is None and not (recheck or reattack):  # which compare it with the base that the card names
        found = found.without_control()
    elif base is not None:
        from hf_immunize.hub.control import check_control  # which asks the Hub; most who verify have files alone

        found = check_control(found, base)
    if recheck or reattack:
        from hf_immunize.hub import search_attacks
        from hf_immunize.hub.control import named_base

        base = base or named_base(folder)
        if base is None:
            raise ConfigError("expected --base with --recheck, got none, and the card names none: a certificate names "
                              "its base by digest, but does not hold it.")
        import secrets

        seed = secrets.randbelow(2**31) if recheck_seed is None else recheck_seed
        how: dict[str, Any] = {"base": base, "task": task, "seed": seed, "device": device}
        if recheck:
            found = _again(folder, found, record, sign_key, trials=recheck, **how)
        if reattack:
            found = search_attacks(folder, found, budget=reattack, **how)
    say(found.as_json() if as_json else outcome(found))
    if found.findings and not as_json:
        say(findings_table(found))
    if not found.ok:
        raise typer.Exit(UNMET if found.sound else UNSOUND)


@app.command(epilog="""Examples:\n
    hf-immunize recheck runs/digits-vit/condition_number --base runs/digits-vit/base
    --task recipes/digits-vit/task.yaml\n
    hf-immunize recheck owner/model --trials 5 --record ./records""")
def recheck(
    target: Target, trials: Annotated[int, typer.Option(help="How many.", min=1)] = 3, base: Base = None,
    task: TaskFile = None, revision: Revision = None, trusted_key: TrustedKey = None, rejudge: Rejudge = False,
    reattack: ReattackCount = 0, recheck_seed: Seed = None, record: RecordFolder = None, sign_key: SignKey = None,
    device: Device = "cpu", as_json: Json = False,
) -> None:
    """Make random trials of a certified exam again, and compare: the same as verify --recheck."""
    verify(
        target, revision=revision, trusted_key=trusted_key, rejudge=rejudge, recheck=trials, reattack=reattack,
        base=base, task=task, recheck_seed=recheck_seed, record=record, sign_key=sign_key, device=device,
        as_json=as_json,
    )


def _again(folder: Path, found: Any, into: Path | None, key: Path | None, **how: Any) -> Any:
    """The verification after a recheck, whose record is signed and written when asked for."""
    from hf_immunize.hub import repeat_attacks
    from hf_immunize.hub.signature import find_key
    from hf_immunize.hub.trust import sign_recheck
    from hf_immunize.records import atomic_write
    from hf_immunize.stages.start import hush

    signing = key or find_key()
    if into is not None and signing is None:
        raise ConfigError("expected a private key for --record, got none: make one with 'hf-immunize keygen'.")
    hush()
    with errors().status(f"attacking again, {how['trials']} trial(s), seed {how['seed']}"):
        found, made = repeat_attacks(folder, found, **how)
    if into is not None and signing is not None and made is not None:
        name, data = sign_recheck(made, signing)
        errors().print(f"Wrote {atomic_write(into / name, data)}")
    return found


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
        from rich.console import Console

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
        import webbrowser

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


@app.command(epilog="""Examples:\n
    hf-immunize compare runs/digits-vit/condition_number runs/digits-vit/closed_form\n
    hf-immunize compare owner/one owner/two --rejudge --json""")
def compare(
    targets: Targets, rejudge: Rejudge = False, trusted_key: TrustedKey = None, checker_key: CheckerKey = None,
    as_json: Json = False,
) -> None:
    """Show certificates side by side with who says so: one table for each exam, since others cannot be compared."""
    from hf_immunize.hub.leaderboard import COLUMNS, group_entries, read_entries, row_of
    from hf_immunize.hub.tables import group_table

    entries = read_entries(targets, rejudge=rejudge, trusted_key=trusted_key, checker_keys=checker_key or ())
    groups = group_entries(entries)
    if as_json:
        say([{"title": group.title, "shared": dict(group.about), "models": [
            dict(zip((*COLUMNS, *group.families), row_of(entry, group.families), strict=True))
            for entry in group.entries]} for group in groups])
    else:
        for group in groups:
            say(group_table(group))
    if not all(entry.found.sound for entry in entries):
        raise typer.Exit(UNSOUND)


@app.command(epilog="""Example:\n
    hf-immunize leaderboard runs/*/ owner/model -o leaderboard.html""")
def leaderboard(
    targets: Targets,
    output: Annotated[Path, typer.Option("-o", "--output", help="Page to write.")] = Path("leaderboard.html"),
    rejudge: Rejudge = False, trusted_key: TrustedKey = None, checker_key: CheckerKey = None,
) -> None:
    """Write a page with a sortable table of certificates for each exam: one file, no network."""
    from hf_immunize.hub.leaderboard import group_entries, leaderboard_html, read_entries
    from hf_immunize.records import atomic_write

    entries = read_entries(targets, rejudge=rejudge, trusted_key=trusted_key, checker_keys=checker_key or ())
    say(f"Wrote {atomic_write(output, leaderboard_html(group_entries(entries)))}")
