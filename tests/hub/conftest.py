"""Makes the synthetic records of ``tests/record_builders.py`` importable here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
