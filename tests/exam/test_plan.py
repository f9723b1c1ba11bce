"""The plan names attacks that exist, and is read without an attack, a judge or torch."""

from __future__ import annotations

import subprocess
import sys

from hf_immunize import exam
from hf_immunize.attacks import ATTACKS, TRAINABILITY, parse_settings
from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY


def test_every_name_in_the_plan_is_one_of_the_tables():
    assert exam.BENIGN == tuple(TRAINABILITY) and exam.BENIGN_DIFFUSION == tuple(DIFFUSION_TRAINABILITY)
    for presets, attacks, learning in (
        (exam.PROTOCOLS, ATTACKS, TRAINABILITY),
        (exam.DIFFUSION_PROTOCOLS, DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY),
    ):
        for name, protocol in presets.items():
            assert protocol.name == name and set(protocol.attacks) <= set(attacks)
            assert set(protocol.trainability) <= set(learning)
            assert len(protocol.seeds) >= protocol.rule.min_seeds, "fewer seeds can never resist"
            parse_settings(protocol.settings, attacks)
            parse_settings(protocol.benign_settings(), learning)


def test_the_plan_is_read_without_torch():
    code = "import sys, hf_immunize.exam as e; e.find_protocol('quick'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_judge_still_knows_the_plan_by_its_old_places():
    from hf_immunize.certification import checklist, protocol

    assert protocol.PROTOCOLS is exam.PROTOCOLS and protocol.Rule is exam.Rule
    assert checklist.lines_not_run is exam.lines_not_run
