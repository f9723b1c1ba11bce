"""The Trainer's ways to the Hub, all of them through the gate of ``hf_immunize.hub.publish``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.utils import logging

logger = logging.get_logger(__name__)


class GatedTrainer(Trainer):
    """A ``Trainer`` that pushes through the gate alone: nothing goes out without a certificate for its weights."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing to do before there is something to publish: the gate creates the repository."""

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Any:
        """Publish ``output_dir`` if its certificate allows it (see ``hf_immunize.hub.publish`` for ``options``).

        Raises:
            PublishRefusedError: no certificate, a certificate of other weights, or a policy that is not met.
        """
        from hf_immunize.hub import publish

        folder = Path(str(self.args.output_dir))
        settings = {"private": self.args.hub_private_repo, **options}
        return publish(
            folder,
            self.args.hub_model_id or folder.name,
            message=commit_message,
            token=token or self.args.hub_token,
            branch=revision,
            **settings,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does; with ``push_to_hub=True``, then try to publish.

        A refusal is a warning here: right after training there is no certificate, its exam has yet to be sat.
        """
        from hf_immunize.errors import PublishRefusedError

        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call and self.args.should_save:
            try:
                self.push_to_hub()
            except PublishRefusedError as error:
                logger.warning(f"not pushed: {error}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints are never pushed: no certificate can speak of them."""
