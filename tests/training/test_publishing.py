"""No way to the Hub around the gate."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_immunize.errors import PublishRefusedError


def test_pushing_without_a_certificate_is_refused_and_names_what_is_missing(make_trainer):
    trainer = make_trainer(max_steps=1, hub_model_id="someone/model")
    trainer.train()
    trainer.save_model()
    with pytest.raises(PublishRefusedError, match="certificate"):
        trainer.push_to_hub(dry_run=True)


def test_push_to_hub_true_trains_and_saves_without_touching_the_network(make_trainer, monkeypatch):
    import socket

    def no_network(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    trainer = make_trainer(
        max_steps=2, push_to_hub=True, hub_model_id="someone/model", hub_token="secret-token", save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.save_model()
    assert (Path(trainer.args.output_dir) / "model.safetensors").is_file()
    for path in Path(trainer.args.output_dir).rglob("*"):
        if path.is_file():
            assert b"secret-token" not in path.read_bytes(), path
