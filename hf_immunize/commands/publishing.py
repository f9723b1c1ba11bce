"""Commands that write for others: publish, card, keygen."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_immunize.commands.app import CODES, app, say

Folder = Annotated[Path, typer.Argument(help="Folder with certificate.json.", exists=True, file_okay=False)]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", help="A ready policy (research, release, strict) or a YAML file; release by "
                              "default.")
]
Json = Annotated[bool, typer.Option("--json", help="Print plain data for scripts.")]
Licence = Annotated[str | None, typer.Option("--license", help="Licence identifier of the Hub, e.g. apache-2.0.")]
BaseModel = Annotated[str | None, typer.Option("--base-model", help="Hub id of the base.")]
Dataset = Annotated[list[str] | None, typer.Option("--dataset", help="Hub id of a data set; may be repeated.")]
Task = Annotated[str | None, typer.Option("--pipeline-tag", help="Task of the model on the Hub.")]


@app.command(epilog=f"""Examples:\n
    hf-immunize publish runs/digits-vit/model owner/model --dry-run\n
    hf-immunize publish ./model owner/model --private --license apache-2.0 --base-model owner/base\n
    hf-immunize publish ./model owner/model --pr --allow-failed\n
{CODES}""")
def publish(
    folder: Folder,
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub; created when it does not exist.")],
    policy: PolicyFile = None,
    allow_failed: Annotated[
        bool, typer.Option("--allow-failed", help="Publish although the verdicts do not meet the policy; the card "
                           "opens with what failed. No option publishes a model without a certificate.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="New repository is private; a public one is refused.")]
    = False,
    branch: Annotated[str | None, typer.Option(help="Commit to this branch.")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="Open a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, without network.")] = False,
    sign_key: Annotated[
        Path | None, typer.Option(help="Private key that signs the certificate; by default the one of 'hf-immunize "
                                  "keygen', where there is one.")
    ] = None,
    no_sign: Annotated[bool, typer.Option("--no-sign", help="Do not sign, although there is a key.")] = False,
    message: Annotated[str | None, typer.Option("-m", "--message", help="Title of the commit.")] = None,
    license_: Licence = None,
    base_model: BaseModel = None,
    dataset: Dataset = None,
    pipeline_tag: Task = None,
    as_json: Json = False,
) -> None:
    """Publish a certified model in one commit. The token is the one of 'hf auth login' or HF_TOKEN."""
    from hf_immunize.hub import Policy
    from hf_immunize.hub.publishing import publish as send

    done = send(
        folder, repo_id, policy=None if policy is None else Policy.read(policy), allow_failed=allow_failed,
        private=private or None, branch=branch, create_pr=pr, dry_run=dry_run, signing_key=sign_key,
        sign=not no_sign, message=message,
        card=_card_options(folder, repo_id, license_, base_model, dataset, pipeline_tag),
    )
    if as_json:
        say(done.as_json())
    else:
        _tell(done)


def _tell(done: Any) -> None:
    """What was published, file by file."""
    from hf_immunize.hub.tables import files_table

    what = "would be uploaded" if done.dry_run else "published"
    rows = [(name, size, what) for name, size in done.files.items()]
    say(files_table([*rows, *((name, -1, "stays here") for name in done.left_out),
                        *((name, -1, "deleted there") for name in done.deleted)]))
    if done.dry_run:
        say(f"Dry run: {len(done.files)} files would be uploaded to {done.repo_id}; nothing was sent.")
        return
    say(f"Published: {done.pull_request or done.url}")
    if not done.control_compared:
        say("The certificate's control was not compared with the base that the card names, which could not be read or "
            "is not on the Hub: whoever checks has to (hf-immunize verify --base).")
    if not done.confirmed:
        say(f"The commit stands, but could not be read back: run hf-immunize verify {done.repo_id} "
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
        say(f"Wrote {write_card(folder, options)}")


@app.command(epilog="""Examples:\n
    hf-immunize keygen\n
    hf-immunize keygen signing.pem""")
def keygen(
    path: Annotated[
        Path | None, typer.Argument(help="File for the private key; must not exist. By default where publish looks: "
                                    "HF_IMMUNIZE_SIGNING_KEY, or ~/.config/hf_immunize/signing.pem.")
    ] = None,
) -> None:
    """Make an Ed25519 key to sign certificates with; prints the public key to give to users."""
    from hf_immunize.hub.signature import default_key_file, make_key

    say(make_key(path or default_key_file()))


def _card_options(
    folder: Path, repo_id: str | None, license_: str | None, base_model: str | None, datasets: list[str] | None,
    pipeline_tag: str | None,
) -> Any:
    """What the folder's own card says, overridden by what was given here."""
    from hf_immunize.hub.release import card_options

    given = {
        "repo_id": repo_id, "license": license_, "base_model": base_model, "datasets": datasets or None,
        "pipeline_tag": pipeline_tag,
    }
    chosen: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return dataclasses.replace(card_options(folder), **chosen)
