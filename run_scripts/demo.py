"""Trains two small LION models on data that the installation brings, and shows what they learnt.

The command itself is `lion_hf/tasks/demo.py`; an installed package runs it as `lion-hf demo`.
"""

from lion_hf.cli import run_script

if __name__ == "__main__":
    run_script("demo")
