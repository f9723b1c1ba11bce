"""The only writes to the network: a certified folder becomes one commit, or nothing happens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from hf_immunize.errors import ConfigError, HubError, PublishRefusedError, VerificationError
from hf_immunize.hub.card import CardOptions
from hf_immunize.hub.card_check import options_of, split_card
from hf_immunize.hub.control import require_control
from hf_immunize.hub.findings import Verification
from hf_immunize.hub.names import CARD, is_harmless
from hf_immunize.hub.policy import Policy
from hf_immunize.hub.release import CHANGED, Release, prepare
from hf_immunize.hub.remote import asked, careful, differences, may_have_arrived

MAIN = "main"


@dataclass(frozen=True)
class Publication:
    """What was published, or would be."""

    repo_id: str
    files: dict[str, int]
    """Bytes by name."""
    left_out: tuple[str, ...]
    deleted: tuple[str, ...]
    """Files of the former revision that the new one does not have."""
    verification: Verification
    dry_run: bool
    revision: str | None = None
    """Commit hash; null after a dry run."""
    url: str | None = None
    pull_request: str | None = None
    control_compared: bool = False
    """The certificate's control was compared with the base that the card names, and is the same."""
    confirmed: bool = False
    """The Hub's own digests of the new revision were read back and are those of the certified files."""

    def as_json(self) -> dict[str, Any]:
        """Plain data for scripts."""
        return {
            "repo_id": self.repo_id, "dry_run": self.dry_run, "revision": self.revision, "url": self.url,
            "pull_request": self.pull_request, "confirmed": self.confirmed, "control_compared": self.control_compared,
            "files": self.files,
            "left_out": list(self.left_out), "deleted": list(self.deleted),
            "verification": self.verification.as_json(),
        }


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    policy: Policy | None = None,
    allow_failed: bool = False,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    card: CardOptions | None = None,
    signing_key: str | Path | None = None,
    sign: bool = True,
    message: str | None = None,
    token: str | None = None,
    api: HfApi | None = None,
    timeout: float | None = 120.0,
) -> Publication:
    """Publish a certified model in one commit to ``repo_id``, which is created when it does not exist.

    Args:
        allow_failed: publish a model that does not meet the policy (``PUBLISHING`` by default).
        private: visibility of a new repository; with True, an existing public one is refused.
        dry_run: run the gate and list what would go; nothing is asked of the network.
        card: what the records do not know; by default what the folder's own card says.
        signing_key: private key that signs; by default the one that ``keygen`` made, where there is one.
        sign: whether to look for that key.
        timeout: seconds of silence after which an answer is given up.

    Raises:
        PublishRefusedError: the gate, see ``release.prepare``.
        HubError: the Hub did not do it. Unless the message says otherwise, nothing was published.
    """
    if branch is not None and create_pr:
        raise ConfigError("expected a branch or a pull request, got both: leave one out.")
    api = api or HfApi(token=token)
    secret = token or (api.token if isinstance(api.token, str) else get_token())
    release = prepare(folder, policy=policy, allow_failed=allow_failed, card=card, repo_id=repo_id,
                      signing_key=signing_key, sign_by_default=sign, token=secret)
    if dry_run:
        return Publication(repo_id, release.sizes, release.left_out, (), release.verification, dry_run=True)
    with careful(timeout, secret):
        compared = _compare_control(release, api, secret)
        done = _Sending(api, repo_id, release, secret).send(private, branch, create_pr, message)
    return dataclasses.replace(done, control_compared=compared)


def _compare_control(release: Release, api: HfApi, token: str | None) -> bool:
    """Whether the base that the card names could be compared with the certificate's control.

    Raises:
        PublishRefusedError: it could, and has other weights.
    """
    named = options_of(*split_card(release.small[CARD].decode())).base_model
    certificate = release.verification.certificate
    if named is None or certificate is None:
        return False
    try:
        require_control(certificate, named, api=api, token=token)
    except VerificationError as error:
        raise PublishRefusedError(str(error)) from error
    except HubError:  # not on the Hub, or not for these eyes: readers compare it with verify --base
        return False
    return True


class _Sending:
    """One release on its way to one repository."""

    def __init__(self, api: HfApi, repo_id: str, release: Release, token: str | None) -> None:
        self.api, self.repo_id, self.release, self.token = api, repo_id, release, token

    def send(self, private: bool | None, branch: str | None, create_pr: bool, message: str | None) -> Publication:
        additions = self._additions()
        head, present = self._open(private, branch, create_pr)
        deleted = tuple(sorted(name for name in present - set(self.release.digests) if not is_harmless(name)))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *additions, *(CommitOperationDelete(name, is_folder=False) for name in deleted)
        ]
        verdict = self.release.verification.certificate
        title = message or f"Publish with certificate: {verdict.overall if verdict else 'unknown'}"
        revision = branch or MAIN

        def commit() -> Any:
            return self.api.create_commit(
                self.repo_id, operations, commit_message=title, revision=None if create_pr else revision,
                create_pr=create_pr, parent_commit=head, token=self.token,
            )

        done, failure = None, None
        try:
            done = asked("take the commit", self.token, commit)
        except HubError as error:
            failure = error
        if done is not None:
            return self._publication(done.oid, str(done.commit_url), done.pr_url, deleted)
        found = None if create_pr else may_have_arrived(self.api, self.repo_id, revision, head, self.release)
        if found is None:
            raise _nothing_published(failure, create_pr)
        return self._publication(found, self._url(found), None, deleted)

    def _additions(self) -> list[CommitOperationAdd]:
        """Operations over the very bytes that were verified: the client's digest of each weight file is compared."""
        found = [CommitOperationAdd(name, data) for name, data in self.release.small.items()]
        for name, path in self.release.weights.items():
            addition = CommitOperationAdd(name, str(path.resolve()))
            if addition.upload_info.sha256.hex() != self.release.digests[name]:
                raise PublishRefusedError(CHANGED.format(name=name))
            found.append(addition)
        return found

    def _open(self, private: bool | None, branch: str | None, create_pr: bool) -> tuple[str | None, set[str]]:
        """Make sure of repository and branch; its head and the files there."""
        api, repo_id, token = self.api, self.repo_id, self.token
        if not create_pr:
            asked("create or find the repository", token,
                  lambda: api.create_repo(repo_id, private=private, exist_ok=True, token=token))
        info = asked("describe the repository", token, lambda: api.model_info(repo_id, token=token))
        if private and not info.private:
            raise PublishRefusedError(
                f"expected a private repository, got the public {repo_id}: make it private on the Hub, choose another "
                "name, or publish openly."
            )
        if branch is not None and branch != MAIN:
            asked("create or find the branch", token,
                  lambda: api.create_branch(repo_id, branch=branch, exist_ok=True, token=token))
            info = asked("describe the branch", token, lambda: api.model_info(repo_id, revision=branch, token=token))
        present = {item.rfilename for item in info.siblings or []}
        if ".gitignore" in present:
            raise PublishRefusedError(
                f"expected {repo_id} without .gitignore, got one: the Hub would leave out files in silence. Delete it."
            )
        return info.sha, present

    def _publication(self, oid: str, url: str, pull_request: str | None, deleted: tuple[str, ...]) -> Publication:
        release = self.release
        try:
            wrong = differences(self.api, self.repo_id, oid, release)
            confirmed = not wrong
        except Exception:  # the commit stands; only its confirmation is missing
            wrong, confirmed = [], False
        if wrong:
            raise HubError(
                f"expected revision {oid} of {self.repo_id} to hold the certified files, got others for "
                f"{', '.join(wrong[:5])}: do not use that revision; publish again."
            )
        return Publication(
            self.repo_id, release.sizes, release.left_out, deleted, release.verification, dry_run=False,
            revision=oid, url=url, pull_request=pull_request, confirmed=confirmed,
        )

    def _url(self, oid: str) -> str:
        return f"{self.api.endpoint}/{self.repo_id}/commit/{oid}"


def _nothing_published(error: HubError | None, create_pr: bool) -> HubError:
    doubt = "A pull request may have been opened: look before you try again." if create_pr else "Nothing was published."
    return HubError(f"{error} {doubt}")


