"""Fine-tunes on GLUE, or on sentences and pairs of sentences of your own.

The command itself is `lion_hf/tasks/glue.py`; an installed package runs it as `lion-hf glue`.
"""

from lion_hf.cli import run_script

if __name__ == "__main__":
    run_script("glue")
