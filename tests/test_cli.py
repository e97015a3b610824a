"""The command line: help without torch, the names of commands, and errors in one line."""

import io
import json
import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import pytest
from support.pages import ROOT
from transformers import TrainingArguments

from lion_hf import cli, hub, startup

COMMANDS = ("mlm", "glue", "images", "demo", "linearize", "convert", "export", "publish")
QUICK = (
    "--help",
    "demo --help",
    "convert --help",
    "export --help",
    "publish --help",
    "",
    "mlmm",
    "convert --x",
)
ENDS = [
    (ValueError("lr=0"), 2),
    (FileNotFoundError("no file"), 2),
    (OSError("no disk"), 1),
    (FloatingPointError("nan"), 1),
]


def run_python(*words: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, without a conftest that has imported everything."""
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in COMMANDS:
        (line,) = [line for line in printed.splitlines() if line.startswith(f"    {name} ")] or [""]
        assert len(line.split()) > 3 or name == "linearize", name  # its help is on the next line
    assert "usage: lion-hf [-h] COMMAND" in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_the_command(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lion-hf {name} ")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("mlmm", "mlm"), ("image", "images"), ("linearise", "linearize"), ("push", "publish")],
)
def test_an_unknown_command_names_the_nearest(typed, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([typed, "--help"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"lion-hf: error: unknown command {typed}: did you mean {meant}?"
        " (--help lists all commands)"
    )


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "publish" in printed.err


def test_an_error_is_one_line(tmp_path, capsys):
    assert cli.main(["convert", str(tmp_path / "nothing"), str(tmp_path / "output")]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and "nothing" in printed.err


@pytest.mark.parametrize("name", cli.TASKS)
@pytest.mark.parametrize(("error", "status"), ENDS)
def test_a_script_ends_with_one_line(name, error, status, monkeypatch, capsys):
    def fail(argv=None, prog=None):
        raise error

    monkeypatch.setattr(import_module(cli.TASKS[name][0]), "main", fail)
    with pytest.raises(SystemExit) as stop:
        cli.run_script(name)
    assert stop.value.code == status
    assert capsys.readouterr().err == f"error: {error}\n"
    assert cli.main([name]) == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_names_that_the_terminal_has_no_characters_for_are_shown(monkeypatch):
    """A class with a Chinese name stopped a run whose output went to a file in ASCII."""
    monkeypatch.setattr(
        import_module(cli.TASKS["demo"][0]), "main", lambda argv=None, prog=None: print("好 ±")
    )
    monkeypatch.setattr(cli, "_prepare_process", lambda started: None)
    monkeypatch.setattr(sys, "argv", ["lion-hf", "demo"])
    for run in (cli.main, lambda: cli.run_script("demo")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        run()
        sys.stdout.flush()
        assert sys.stdout.buffer.getvalue().split() == [rb"\u597d", rb"\xb1"]


@pytest.mark.parametrize("terminal", [None, "without an answer"])
def test_publishing_without_an_answer_uploads_nothing(terminal, monkeypatch, capsys, tmp_path):
    """With standard input closed (`<&-`), and after Ctrl-D."""
    monkeypatch.setattr(hub, "files_to_publish", lambda *_: None)
    monkeypatch.setattr(hub, "public_files", lambda _: {})
    (tmp_path / "README.md").write_text('"owner/name"')
    end = io.StringIO()
    end.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal and end)
    assert cli.main(["publish", str(tmp_path), "owner/name"]) == (1 if terminal else 2)
    printed = capsys.readouterr()
    assert ("Nothing was uploaded." in printed.out) == bool(terminal)
    assert ("there is no terminal to ask at" in printed.err) != bool(terminal)


@pytest.mark.parametrize(
    "words",
    [
        "mlm --train_file nowhere.txt --output_dir OUT",
        "mlm --train_file nowhere.txt --max_length 2 --output_dir OUT",
        "glue --model_name_or_path nowhere --train_file nowhere.csv --validation_file nowhere.csv"
        " --output_dir OUT",
        "images --data_path nowhere --output_dir OUT",
        "linearize nowhere OUT",
        "convert nowhere OUT",
        "publish nowhere owner/name --yes",
        "demo --output FILE",
        "demo --seed x",
    ],
)
def test_a_mistake_ends_with_2(words, tmp_path, monkeypatch, capsys):
    """Whether argparse finds it or the command does; the work has not begun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    words = words.replace("OUT", "out").replace("FILE", "file/demo")
    try:
        status = cli.main(words.split())
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "nowhere" in last or "expected" in last or "invalid int value" in last
    assert not (tmp_path / "out").exists()


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupt(argv=None, prog=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module(cli.TASKS["demo"][0]), "main", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def loaded(words: str, *modules: str) -> list[str]:
    """Which of the modules a command has loaded when it ends."""
    code = (
        "import json, sys; sys.argv[0] = 'lion-hf'\n"
        "try:\n"
        "    from lion_hf.cli import main\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print(json.dumps(sorted({set(modules)!r} & set(sys.modules))))"
    )
    result = run_python("-c", code, *words.split())
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("words", QUICK)
def test_what_runs_nothing_imports_no_torch(words):
    assert loaded(words, "torch", "transformers", "timm") == []


@pytest.mark.parametrize("words", ["--help", "linearize --help"])
def test_python_m_is_the_same_command(words):
    result = run_python("-X", "importtime", "-m", "lion_hf", *words.split())
    assert result.returncode == 0 and result.stdout.startswith("usage: lion-hf ")
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "lion_hf.cli" in imported and "torch" not in imported


@pytest.mark.parametrize(
    "words", ["--help", "source out --budget soon", "source out --mask_typ lit"]
)
def test_what_linearize_says_at_once_needs_no_torch(words):
    """Its options are dataclasses, which transformers turns into a parser."""
    assert loaded(f"linearize {words}", "torch", "timm", "datasets") == []


@pytest.mark.parametrize("name", cli.SETTINGS)
def test_help_of_a_training_command_needs_no_torch(name):
    """So it starts as fast as `import transformers` does, whose parser it takes."""
    assert loaded(f"{name} --help", "torch", "timm", "datasets", "accelerate") == []


@pytest.mark.parametrize("name", cli.SETTINGS)
def test_help_shows_the_own_options_and_help_all_the_others(name, capsys):
    """Through the command line and through the module of the command, which run_scripts/ calls."""
    settings, task = import_module(cli.SETTINGS[name]), import_module(cli.TASKS[name][0])
    texts = []
    for show in (
        lambda: cli.main([name, "--help"]),
        lambda: task.main(["--help"], prog=f"lion-hf {name}"),
        lambda: cli.main([name, "--help_all"]),
    ):
        with pytest.raises(SystemExit) as stop:
            show()
        assert stop.value.code == 0
        texts.append(capsys.readouterr().out)
    short, same, long = texts
    assert short == same and "--help_all lists them" in short
    own = {field.name for cls in settings.OPTIONS for field in fields(cls)}
    every = own | {field.name for field in fields(TrainingArguments) if field.init}
    assert [option for option in own if f"--{option}" not in short] == []
    assert [option for option in every if f"--{option}" not in long] == []
    assert "--max_grad_norm" not in short and "--max_grad_norm" in long


def test_names_in_the_help_are_those_of_the_tables():
    """They are written twice, because the tables load torch."""
    from lion_hf.modeling.image_processing_lion import MAX_BYTES
    from lion_hf.tasks import glue_settings, glue_tasks, image_settings, metrics

    assert tuple(glue_tasks.TASKS) == glue_settings.TASK_NAMES
    assert tuple(metrics.METRICS) == glue_settings.METRIC_NAMES
    assert image_settings.MEGABYTES * 1_000_000 == MAX_BYTES


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import lion_hf",
        "import sys; sys.argv[0] = 'lion-hf'; import lion_hf, lion_hf.startup as s; s.register()",
    ],
    ids=["import", "command"],
)
def test_lion_is_registered(code):
    """By the import of the package, and in the command line before a command runs."""
    code += (
        "\nfrom transformers import AutoConfig, AutoModelForMaskedLM\n"
        "config = AutoConfig.for_model('lion', num_hidden_layers=1, hidden_size=8,\n"
        "    num_attention_heads=1, intermediate_size=8, vocab_size=20)\n"
        "print(type(AutoModelForMaskedLM.from_config(config)).__name__)\n"
        "import timm; print(timm.is_model('lion_tiny_patch16_224'))"
    )
    result = run_python("-c", code)
    assert result.stdout.split() == ["LionForMaskedLM", "True"], result.stderr


def test_a_worker_of_a_command_registers(monkeypatch):
    """A process that multiprocessing starts inherits the command's name, but is not the command."""
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lion-hf", "mlm"])
    assert startup.is_command_line()
    monkeypatch.setattr(startup.multiprocessing, "parent_process", lambda: object())
    assert not startup.is_command_line()


@pytest.mark.parametrize("begun", (False, True))
@pytest.mark.parametrize("slash", ("", "/"))
def test_an_interrupted_linearize_says_whether_it_goes_on(
    slash, begun, tmp_path, monkeypatch, capsys
):
    """Ctrl-C before the first checkpoint leaves nothing to go on from."""

    def interrupt(source, output, **options):
        if begun:
            (tmp_path / "lion.run").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("lion_hf.linearize.checkpoint.linearize_checkpoint", interrupt)
    text = tmp_path / "train.txt"
    text.write_text("a line\n")
    words = ["linearize", "source", f"{tmp_path / 'lion'}{slash}", "--train_file", str(text)]
    assert cli.main(words) == 130
    assert ("goes on" if begun else "starts anew") in capsys.readouterr().err
