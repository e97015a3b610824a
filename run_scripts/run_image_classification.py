"""Trains an image classifier.

The command itself is `lion_hf/tasks/image_classification.py`; an installed package runs it as
`lion-hf images`.
"""

from lion_hf.cli import run_script

if __name__ == "__main__":
    run_script("images")
