"""Pretrains a masked language model.

The command itself is `lion_hf/tasks/mlm.py`; an installed package runs it as `lion-hf mlm`.
"""

from lion_hf.tasks.mlm import main

if __name__ == "__main__":
    main()
