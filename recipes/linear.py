"""Linear immunization from one YAML: load two tasks, run every method, write results.json and print the table.

    python recipes/linear.py recipes/linear-house-prices/linear.yaml --data_dir <folder> --output_dir runs/linear
"""

import sys

from hf_immunize.stages.linear import load_plan, main, run

__all__ = ["load_plan", "main", "run"]

if __name__ == "__main__":
    sys.exit(main())
