"""Pretrains a masked language model.

The command itself is `lion_hf/tasks/mlm.py`; an installed package runs it as `lion-hf mlm`.
"""

from lion_hf.cli import run_script

if __name__ == "__main__":
    run_script("mlm")
