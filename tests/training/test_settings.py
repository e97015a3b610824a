"""Settings from YAML and the command line."""

import re
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml
from support.models import text_config

from lion_hf.training.settings import load_yaml, parse_overrides, parse_settings, save_settings
from lion_hf.training.trainer import LionTrainingArguments


@dataclass
class Settings:
    rate: float = field(default=0.5, metadata={"help": "A rate."})
    names: list[str] | None = field(default=None, metadata={"help": "Names."})
    kind: Literal["one", "two"] = field(default="one", metadata={"help": "A kind."})
    flag: bool = field(default=False, metadata={"help": "A flag."})
    count: int | None = field(default=None, metadata={"help": "A count."})

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate={self.rate}: expected a number of at least 0")


def parse(*argv: str) -> Settings:
    return parse_settings("A program.", Settings, argv=argv)[0]


def test_command_line_overrules_the_file(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("rate: 1e-3\nnames: [a, b]\nkind: two\nflag: true\ncount: -3\n")
    assert parse("--config", str(file)) == Settings(1e-3, ["a", "b"], "two", True, -3)
    assert parse("--rate", "2", "--config", str(file), "--names", "c") == Settings(
        2.0, ["c"], "two", True, -3
    )
    file.write_text("rate: null\n")
    assert parse("--config", str(file)) == Settings()
    file.write_text("")
    assert parse("--config", str(file)) == Settings()


@pytest.mark.parametrize(
    ("argv", "text", "message"),
    [
        (["--rat", "3"], "", r"unknown option --rat: did you mean --rate\?"),
        (["--learning"], "", "unknown option --learning"),
        ([], "cuont: 3", r"settings.yaml: unknown key cuont: did you mean count\?"),
        ([], "config: x", "unknown key config"),
        ([], "kind: three", "invalid choice.*three"),
        (["--count", "many"], "", "invalid int value"),
        ([], "rate: -1", "rate=-1.0: expected a number of at least 0"),
        ([], "[1, 2]", "holds a list: expected lines of the form"),
        ([], "rate: [", "cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, argv, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse("--config", str(file), *argv)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_missing_file(capsys):
    with pytest.raises(SystemExit):
        parse("--config", "nowhere.yaml")
    assert "--config nowhere.yaml cannot be read" in capsys.readouterr().err


def test_saved_settings_make_the_same_run(tmp_path):
    argv = [
        "--output_dir",
        str(tmp_path),
        "--lr_scheduler_type",
        "polynomial",
        "--lr_scheduler_kwargs",
        '{"lr_end": 1e-5}',
    ]
    argv += [
        "--names",
        "x",
        "y z",
        "--flag",
        "--max_steps",
        "7",
        "--report_to",
        "none",
        "--resume",
        "never",
        "--use_cpu",
    ]
    settings, args = parse_settings("A program.", Settings, LionTrainingArguments, argv=argv)
    saved = save_settings(tmp_path, settings, args)
    assert yaml.safe_load((tmp_path / "settings.yaml").read_text()) == saved
    again, args_again = parse_settings(
        "", Settings, LionTrainingArguments, argv=["--config", str(tmp_path / "settings.yaml")]
    )
    assert again == settings
    kept = (
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "max_steps",
        "resume",
        "use_cpu",
        "learning_rate",
        "report_to",
        "seed",
    )
    for name in kept:
        assert getattr(args_again, name) == getattr(args, name), name


def test_output_dir_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        parse_settings("", LionTrainingArguments, argv=["--max_steps", "3"])
    assert "--output_dir" in capsys.readouterr().err


def with_total_batch_size(folder, size: str) -> LionTrainingArguments:
    """The arguments of a training with 4 samples per device."""
    argv = [
        *("--output_dir", str(folder), "--use_cpu"),
        *("--per_device_train_batch_size", "4", "--total_batch_size", size),
    ]
    return parse_settings("", LionTrainingArguments, argv=argv)[0]


def test_total_batch_size(tmp_path, capsys):
    assert with_total_batch_size(tmp_path, "12").gradient_accumulation_steps == 3
    with pytest.raises(SystemExit):
        with_total_batch_size(tmp_path, "10")
    assert "total_batch_size=10: expected a multiple of the 4 samples" in capsys.readouterr().err


def test_options_that_do_nothing_here(tmp_path, capsys):
    argv = ["--output_dir", str(tmp_path), "--use_cpu"]
    with pytest.raises(SystemExit):
        parse_settings("", LionTrainingArguments, argv=[*argv, "--resume_from_checkpoint", "old"])
    assert "--resume_from_checkpoint: its name here is --resume" in capsys.readouterr().err
    argv += ["--total_batch_size", "32", "--auto_find_batch_size", "true"]
    with pytest.raises(SystemExit):
        parse_settings("", LionTrainingArguments, argv=argv)
    assert "total_batch_size=32 with auto_find_batch_size=True" in capsys.readouterr().err


def test_total_batch_size_of_one_process_with_several_gpus(tmp_path, monkeypatch):
    """Trainer spreads the batch over them by DataParallel."""
    monkeypatch.setattr(LionTrainingArguments, "n_gpu", 2)
    assert with_total_batch_size(tmp_path, "16").gradient_accumulation_steps == 2


def test_overrides():
    config = text_config()
    assert parse_overrides(
        "hidden_size=64, mask_type=lit,normalize_attention=true,drop_path_rate=0.1", config
    ) == {
        "hidden_size": 64,
        "mask_type": "lit",
        "normalize_attention": True,
        "drop_path_rate": 0.1,
    }
    assert parse_overrides('{"hidden_size": 64}', config) == {"hidden_size": 64}
    assert parse_overrides(None, config) == {}
    with pytest.raises(ValueError, match="unknown field hiden_size: did you mean hidden_size"):
        parse_overrides("hiden_size=64", config)
    with pytest.raises(ValueError, match="expected name=value,name=value"):
        parse_overrides("hidden_size=[", config)


def test_words_that_yaml_takes_for_booleans_are_words(tmp_path):
    """YAML 1.1 reads no, on and off as booleans, 007 as 7, 12:30 as 750, and a date as a date."""
    file = tmp_path / "settings.yaml"
    file.write_text("names: [no, on, 007, 12:30, 2020-01-01, 1e3, Off, '1']\nflag: yes\nrate: 1e-3")
    words = ["no", "on", "007", "12:30", "2020-01-01", "1e3", "Off", "1"]
    assert parse("--config", str(file)) == Settings(1e-3, words, flag=True)
    file.write_text(
        f"output_dir: {tmp_path}\nreport_to: no\nsave_strategy: no\neval_strategy: no\n"
    )
    (args,) = parse_settings("", LionTrainingArguments, argv=["--config", str(file), "--use_cpu"])
    assert (args.report_to, args.save_strategy, args.eval_strategy) == ([], "no", "no")
    saved = save_settings(tmp_path, args)
    assert load_yaml((tmp_path / "settings.yaml").read_text()) == saved


@pytest.mark.parametrize(
    "value",
    ["no", "1e-3", "1e3", "007", "12:30", "true", "null", "", "2020-01-01", ".inf", "0x1f", "a: b"]
    + [1e-5, 0.1, 1e22, float("inf"), 3, -7, 1.0, True, None, 2e-7],
    ids=repr,
)
def test_saved_values_are_read_as_they_were(tmp_path, value):
    @dataclass
    class One:
        x: object

    save_settings(tmp_path, One(value))
    found = load_yaml((tmp_path / "settings.yaml").read_text()) or {}
    assert found == ({} if value in (None, "") else {"x": value})
    assert type(found.get("x", value)) is type(value)


def test_switches_and_numbers_of_overrides():
    config = text_config()
    found = parse_overrides("normalize_attention=no,qkv_bias=on,drop_path_rate=1e-3", config)
    assert found == {"normalize_attention": False, "qkv_bias": True, "drop_path_rate": 0.001}


def test_settings_that_cannot_be_read_are_kept_from_a_run(tmp_path, monkeypatch):
    """A full disk leaves the old settings, and nothing half-written."""
    (args,) = parse_settings("", LionTrainingArguments, argv=["--output_dir", str(tmp_path)])
    save_settings(tmp_path, args)
    before = (tmp_path / "settings.yaml").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_settings(tmp_path, args)
    assert (tmp_path / "settings.yaml").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["settings.yaml"]


def test_aliases_cannot_fill_the_memory():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(1, 12):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    for text in ("\n".join(lines), "a: &a [*a]"):
        with pytest.raises(ValueError, match="more than 100000 values"):
            load_yaml(text)
    assert load_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}
