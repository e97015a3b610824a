"""The benchmarks: reports of a quick run, no times for wrong results, the peers, and messages."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.oracle import check, make_problem
from support.pages import PAGES, text
from tqdm import tqdm

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Imports a module from the scripts' folder."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


@pytest.fixture
def measure(module):
    return module("measure")


def causal(q, k, v, g=None, g_gamma=None, scale=1.0):
    """A causal pass as in `chunk_simple_gla`, layout (B, L, H, ...); `g_gamma` gets no gradient."""
    gates = (g_gamma.detach().expand(q.shape[:3]) if g is None else g).exp()
    state, output = 0, []
    for t in range(q.shape[1]):
        state = gates[:, t, :, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        output.append(scale * torch.einsum("bhd,bhde->bhe", q[:, t], state))
    return torch.stack(output, 1), None


@pytest.mark.parametrize("length", (1, 2, 9))
@pytest.mark.parametrize("mask_type", ("decay", "selective"))
def test_two_causal_passes_are_lion(module, mask_type, length):
    """With every gradient, but for that of fixed gates."""
    problem = make_problem(mask_type, length)
    fixed = mask_type == "decay"
    if fixed:
        del problem.expected["dlog_decay"]

    def passes(query, key, value, log_decay, normalize, scale):
        query = query * (
            scale * query.shape[-1] ** 0.5
        )  # the peer's own is that of `lion_attention`
        return module("peers").two_passes(causal, fixed, query, key, value, log_decay)

    check(problem, passes, torch.float64, 1e-12)


def test_two_products_are_lion(module):
    problem = make_problem("lit", 9)

    def products(query, key, value, normalize, scale):
        return module("peers").two_products(
            query * (scale * query.shape[-1] ** 0.5), key, value, None
        )

    check(problem, products, torch.float64, 1e-12)


def test_peers_are_checked_before_they_are_timed(module, capsys):
    """A correct peer becomes a column; one that is wrong or fails is named and left out."""

    def unshifted(query, key, value, log_decay):
        """LION-S where the target's gate acts."""
        query, key, value, gates = (x.transpose(1, 2) for x in (query, key, value, log_decay))
        return causal(query, key, value, gates, scale=query.shape[-1] ** -0.5)[0].transpose(1, 2)

    def untrained(query, key, value, log_decay):
        """Right sums whose keys' gradient is doubled."""
        return module("peers").two_passes(
            causal, False, query, 2 * key - key.detach(), value, log_decay
        )

    def failing(*inputs):
        raise RuntimeError("refuses the backward pass")

    peer, passes = module("peers").Peer, module("peers").two_passes
    peers = {"products": peer("LION-lit", module("peers").two_products)}
    peers["fixed"] = peer("LION-D", partial(passes, causal, True), learns_gates=False)
    peers |= {
        "passes": peer("LION-S", partial(passes, causal, False)),
        "unshifted": peer("LION-S", unshifted),
    }
    peers |= {"untrained": peer("LION-S", untrained), "failing": peer("LION-S", failing)}
    args = argparse.Namespace(device="cpu", dtype="float32", quick=False)
    found = {}
    for what in ("forward", "forward + backward"):
        found[what] = module("run").op_group(args, 20, what, peers)
        found[what].check()
        for function in found[what].functions.values():
            function()
    ours = {"LION-lit", "LION-D", "LION-S", "SDPA"}
    assert set(found["forward"].functions) == ours | {"products", "fixed", "passes", "untrained"}
    assert set(found["forward + backward"].functions) == ours | {"products", "fixed", "passes"}
    assert (
        "failing, forward, 20 tokens: left out: refuses the backward pass"
        in capsys.readouterr().err
    )


def test_ratios_to_another_column(measure):
    """They are shown beside those to the baseline, and without one, if both columns exist."""
    functions = {"ours": lambda: None, "theirs": lambda: None, "base": lambda: None}
    rows = []
    with tqdm(disable=True) as progress:
        for baseline, names in (
            ("base", functions),
            (None, ("ours", "theirs")),
            ("base", ("ours", "base")),
        ):
            calls = {name: functions[name] for name in names}
            group = measure.Group(
                "s", 8, "w", calls, baseline, lambda: None, beside={"ours": "theirs"}
            )
            rows.append(measure.time_group(group, "cpu", 0, progress))
    assert [set(row.ratios) for row in rows] == [
        {"ours", "theirs", "ours / theirs"},
        {"ours / theirs"},
        {"ours"},
    ]
    *_, head, _, first, _, last = measure.table(
        {"device": "d", "dtype": "t", "date": "0", "command": "c"}, rows, "ms"
    ).split("\n")
    assert head == "| length | what | base (ms) | ours | theirs | ours / theirs | turns |"
    assert (
        first.count("**") == 6 and last.count("–") == 3
    )  # two missing columns, and the dash between two quartiles


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, FOLDER / "run.py", *arguments], capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_quick_run_of_everything(tmp_path):
    """Every suite leaves JSON, table and plot, and each ratio is that of the times beside it."""
    finished = run("all", "--quick", "--output", str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-2000:]
    for suite in ("op", "model", "train", "memory", "training-memory", "chunks", "forms"):
        report = json.loads((tmp_path / f"{suite}-cpu.json").read_text())
        assert (
            report["rows"] and report["about"]["torch"] and "--quick" in report["about"]["command"]
        )
        for row in report["rows"]:
            assert all(value >= 0 for value in row["values"].values())
            assert (row["baseline"] is None) == suite.endswith("memory")
            assert suite != "train" or {"LION-lit", "LION-D", "LION-S"} < set(row["ratios"])
            for name, (low, middle, high) in row["ratios"].items():
                assert low <= middle <= high
                # The bounds are wide because other jobs may run at the same time.
                quotient = row["values"][name] / row["values"][row["baseline"]]
                assert 0.05 < middle / quotient < 20
                assert name in row["values"] and name != row["baseline"]
        table = (tmp_path / f"{suite}-cpu.md").read_text()
        assert suite != "train" or ("### image training" in table and "LION-S snake" in table)
        assert table in finished.stdout and "| length |" in table
        assert (tmp_path / f"{suite}-cpu.png").stat().st_size > 5000


@pytest.mark.slow
def test_quick_run_of_serving(tmp_path):
    """Both models are exported, agree with torch, and are timed."""
    pytest.importorskip("onnxscript")
    command = [sys.executable, FOLDER / "serving.py", "--quick", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    table = (tmp_path / "serving-cpu.md").read_text()
    assert table in finished.stdout
    assert all(row in table for row in ("| 16 | forward", "| 70 | forward", "| ModernBERT | "))


@pytest.mark.slow
def test_quick_run_of_the_modern_block(tmp_path):
    """Every model trains and runs in another width, after the check of LION's forms."""
    command = [sys.executable, FOLDER / "modern_block.py", "--quick", "--width", "256"]
    finished = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    table = (tmp_path / "modern-256.md").read_text()
    assert table in finished.stdout
    assert "| 64 | training step, 2 x 64 |" in table and "| 64 | forward, 2 x 64 |" in table


@pytest.mark.slow
def test_quick_run_of_the_errors(tmp_path):
    """The report has every family, dtype and form: nearly exact in float32, less so in bfloat16."""
    command = [sys.executable, FOLDER / "precision.py", "--quick", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    report = json.loads((tmp_path / "precision-cpu.json").read_text())
    found = {
        (row["family"], row["form"], row["dtype"], row["normalize"]) for row in report["operation"]
    }
    assert len(found) == 3 * 3 * 3 * 2 and len(report["models"]) == 8 * 7
    for row in report["operation"]:
        assert ("query" in row["errors"]) and 1e-9 < row["errors"]["output"][0] < (
            2e-6 if row["dtype"] == "float32" else 4e-3
        )
    assert (
        max(row["errors"]["output"][0] for row in report["operation"] if row["dtype"] == "bfloat16")
        > 1e-3
    )
    table = (tmp_path / "precision-cpu.md").read_text()
    assert (
        table in finished.stdout and "--quick" in table and "| bfloat16 | recurrent | 64 |" in table
    )
    assert (tmp_path / "precision-cpu.png").stat().st_size > 5000


def test_nothing_is_timed_on_a_red_check(measure):
    def check():
        raise AssertionError("results differ")

    called = []
    group = measure.Group("suite", 8, "forward", {"ours": lambda: called.append(1)}, None, check)
    with pytest.raises(AssertionError, match="results differ"), tqdm(disable=True) as progress:
        measure.time_group(group, "cpu", 0, progress)
    assert not called


def test_ratios_are_those_of_the_times(measure):
    """A function that does the work five times takes about five times as long."""
    x = torch.randn(300, 300)
    functions = {"five": lambda: [x @ x for _ in range(5)], "one": lambda: x @ x}
    with tqdm(disable=True) as progress:
        row = measure.time_group(
            measure.Group("s", 8, "product", functions, "one", lambda: None), "cpu", 0.5, progress
        )
    assert 2 < row.ratios["five"][1] < 12 and "one" not in row.ratios and row.repeats >= 3


def test_a_failed_group_does_not_take_the_others_with_it(
    measure, module, tmp_path, monkeypatch, capsys
):
    def check():
        raise AssertionError("results differ")

    script = module("run")
    groups = [
        measure.Group(
            "suite", n, "forward", {"ours": list}, None, check if n == 8 else lambda: None
        )
        for n in (8, 9)
    ]
    monkeypatch.setattr(
        script, "SUITES", {"op": lambda args: [lambda group=group: group for group in groups]}
    )
    monkeypatch.setattr(script, "rates", lambda *args: (1.0, 1.0))
    args = argparse.Namespace(
        device="cpu", dtype="float32", compile=False, seconds=0, output=tmp_path
    )
    assert script.measure("op", args) == 1
    assert "results differ" in capsys.readouterr().err
    assert [
        row["length"] for row in json.loads((tmp_path / "op-cpu.json").read_text())["rows"]
    ] == [9]
    monkeypatch.setattr(sys, "argv", ["run.py", "all", "--output", str(tmp_path), "--seconds", "0"])
    with pytest.raises(SystemExit, match="1 of the groups failed"):
        script.main()


def test_other_cuts_of_the_kernels(module):
    """In the interpreter: the candidates, the recorded launches, what is refused and proposed."""
    pytest.importorskip("triton")
    blocks = module("blocks")
    case = blocks.Case("grad_query", torch.bfloat16, 64, 20, 1)
    own = blocks.table_row(case)
    rows = blocks.candidates(own, few=False)
    assert rows[0] == own and len(set(rows)) == len(rows) > 5
    launches = blocks.both_passes(case, rows[1], blocks.inputs_of(case, 1, "cpu"))[1]
    assert [launch.keywords["BLOCK_M"] for launch in launches] == [rows[1].rows] and rows[
        1
    ].rows != own.rows
    assert blocks.refusal((case, rows[1], "cpu")) is None
    assert "Error: " in blocks.refusal((case, own._replace(rows=24), "cpu"))
    report = [{"milliseconds": {str(tuple(own)): 2.0, str(tuple(rows[1])): 1.0}, "refused": {}}]
    about = {"device": "some", "date": "today", "torch": "2", "triton": "3", "command": "python"}
    assert f"grad_query: (2, 64): Blocks{tuple(rows[1])},  # 0.5" in blocks.table(
        about, [case], report
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["op", "--lengths", "0"], "--lengths 0: expected integers of at least 1"),
        (["op", "--output", __file__], f"--output {__file__}: this path is or goes through a file"),
        (["ops"], "invalid choice: 'ops'"),
        (["blocks"], "blocks: times the kernels of a GPU; add --device cuda"),
        pytest.param(
            ["op", "--device", "cuda"],
            "torch finds no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_mistakes(arguments, message):
    finished = run(*arguments)
    assert finished.returncode != 0 and message in finished.stderr and finished.stdout == ""


@pytest.mark.parametrize("page", PAGES)
def test_figures_of_the_pages_are_those_of_the_results(page):
    """Every row of a table whose head stands in a report stands there too."""
    reports = "\n".join(path.read_text() for path in (FOLDER / "results").glob("*.md"))
    tables = re.findall(r"(?:^\|.*\n)+", text(page), re.MULTILINE)
    shown = [table for table in tables if table.splitlines()[0] in reports]
    least = {
        "README.md": 1,
        "docs/choosing.md": 2,
        "docs/linearize.md": 1,
        "docs/long_inputs.md": 3,
        "docs/padding_and_packing.md": 1,
        "docs/speed.md": 7,
        "docs/training.md": 6,
        "docs/using.md": 1,
    }
    assert len(shown) >= least.get(page, 0)
    for row in "".join(shown).splitlines():
        assert row in reports


def test_pictures_of_many_shapes(module, learning_data, tmp_path):
    script = module("native_resolution")
    for name in ("one", "two"):
        source, counts = learning_data / "fashion_mnist", {"train": 1, "test": 1}
        script.make_clothes(source, tmp_path / name, counts)
    files = sorted((tmp_path / "one").glob("*/*/*.png"))
    assert len(files) == 20
    sizes = {Image.open(file).size for file in files}
    assert len(sizes) > 10 and all(0.6 * 19 <= side <= 45 for size in sizes for side in size)
    for file in files:  # every arm gets the same
        assert file.read_bytes() == Path(str(file).replace("/one/", "/two/")).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
def test_an_arm_on_pictures_of_many_shapes(module, learning_data, tmp_path, native, monkeypatch):
    script = module("native_resolution")
    script.make_clothes(learning_data / "fashion_mnist", tmp_path / "data", {"train": 1, "test": 1})
    fields, _, side = script.TASKS["clothes"]
    monkeypatch.setitem(script.TASKS, "clothes", (fields, ["--max_steps=1"], side))
    row = script.train("clothes", native, tmp_path)
    patches = float(row.split("|")[3])
    assert (20 < patches < 49) if native else patches == 49


@pytest.fixture
def learning_data(tmp_path) -> Path:
    """Some rows of every kind of data that the learning benchmark reads."""
    data = tmp_path / "data"
    lines = [f"word{n % 37} and word{n % 11} make a line of text" for n in range(400)]
    for name in ("speeches", "sentiment", "pairs", "chapters"):
        (data / name).mkdir(parents=True)
    for part in ("train", "validation"):
        (data / "speeches" / f"{part}.txt").write_text("\n".join(lines), encoding="utf-8")
        for name, columns in (("sentiment", 1), ("pairs", 2)):
            head = ",".join(["sentence1", "sentence2"][:columns])
            rows = [",".join([line] * columns) + f",{n % 2}" for n, line in enumerate(lines[:40])]
            table = "\n".join([f"{head},label", *rows])
            (data / name / f"{part}.csv").write_text(table, encoding="utf-8")
    chapters = [json.dumps({"id": 1000 * (n % 3 + 1) + n, "text": lines[n]}) for n in range(40)]
    (data / "chapters" / "documents.jsonl").write_text("\n".join(chapters), encoding="utf-8")
    for part in ("train", "test"):
        for label in range(10):
            place = data / "fashion_mnist" / part / f"class{label}"
            place.mkdir(parents=True)
            Image.new("L", (28, 28), label * 20).save(place / "0.png")
    return data


@pytest.mark.slow
def test_learning_runs_goes_on_and_reports(module, learning_data, tmp_path, capsys):
    """Every arm trains on every kind of task; a second call finds all done; the report has them."""
    learning = module("learning")
    command = ["run", "--data", str(learning_data), "--quick", "--output", str(tmp_path / "out")]
    command += ["--rates", "1e-3", "--seeds", "1"]
    with pytest.raises(SystemExit):
        learning.main([*command, "--tasks", "sentiment"])
    assert "run --tasks mlm-128 first" in capsys.readouterr().err
    command += ["--tasks", "chapters", "mlm-512", "mlm-128", "recall-64"]
    command += ["sentiment", "fashion-mnist"]
    learning.main(command)
    log = tmp_path / "out" / "learning.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert len(entries) == 2 * (5 * len(learning.ARMS) + len(learning.IMAGE_ARMS))
    for task in {entry["task"] for entry in entries}:
        sizes = [entry["parameters"] for entry in entries if entry["task"] == task]
        assert max(sizes) <= 1.01 * min(sizes), task
    learning.main(command)
    assert log.read_text(encoding="utf-8").splitlines() == lines
    longer = [*command[:6], "--seeds", "1", "--tasks", "sentiment", "--arms", "modern LION-S"]
    learning.main([*longer, "--steps", "5"])
    added = [json.loads(x) for x in log.read_text(encoding="utf-8").splitlines()[len(lines) :]]
    assert [(x["arm"], x["seed"], x["steps"]) for x in added] == [("modern LION-S", 1, 5)]
    with pytest.raises(SystemExit):
        learning.main([*longer, "--steps", "3"])
    assert "--steps 3: expected more than the 3 of sentiment" in capsys.readouterr().err
    arms = ["--tasks", "mlm-128", "--arms", "modern LION-S", "ModernBERT", "--turns", "1"]
    learning.main(["time", *command[1:3], "--output", str(tmp_path / "out"), *arms])
    times = (tmp_path / "out" / learning.TIMES).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["arm"] for line in times] == ["modern LION-S", "ModernBERT"]
    learning.main(["report", "--output", str(tmp_path / "out")])
    table = (tmp_path / "out" / "learning.md").read_text(encoding="utf-8")
    assert all(f"| {arm} |" in table for arm in [*learning.ARMS, *learning.IMAGE_ARMS])
    assert "| modern LION-S, 5 steps |" in table and "that of the shorter runs" in table
    assert (tmp_path / "out" / "learning-mlm-128.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        learning.main(["run", "--data", str(tmp_path / "nowhere")])
    assert "expected a folder with speeches/train.txt" in capsys.readouterr().err


def learning_run(seed: int, loss: float, seconds: float = 10.0) -> dict:
    curve = [[1, seconds / 2, {"loss": loss + 1}], [2, seconds, {"loss": loss}]]
    return {"seed": seed, "loss": loss, "curve": curve}


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((0.10, 0.11, 0.12), "better"),
        ((0.001, -0.001, 0.0), "at least as good"),
        ((-0.10, -0.11, -0.12), "worse"),
        ((0.5, -0.5, 0.0), "open"),
    ],
)
def test_learning_claims_what_the_interval_allows(module, gains, said):
    reports = module("learning_report")
    assert reports.verdict(module("learning_tasks").TASKS["mlm-128"], gains) == said


def test_learning_compares_paired_seeds_at_equal_time(module):
    reports = module("learning_report")
    slow, fast = learning_run(1, 4.0, seconds=20.0), learning_run(1, 5.0)
    assert reports.at_seconds(slow, "loss", 10.0) == 5.0
    assert reports.at_seconds(slow, "loss", 15.0) == 4.5
    assert reports.at_seconds(fast, "loss", 15.0) == 5.0
    assert reports.paired([learning_run(0, 1.0), slow]) == {1: slow}
    slow |= {"task": "mlm-128", "arm": "LION", "cpu_seconds": 20.0}
    steps = [{"task": "mlm-128", "arm": "LION", "step_seconds": x} for x in (9.0, 3.0)]
    timed = reports.timed(slow, steps)  # the last measurement counts
    assert timed["cpu_seconds"] == 6.0 and [point[1] for point in timed["curve"]] == [3.0, 6.0]
    assert reports.timed(slow, [steps[0] | {"arm": "BERT"}]) == slow
    longer = {**slow, "arm": "ModernBERT", "steps": 900}
    found = reports.by_arm(
        module("learning_tasks").TASKS["mlm-128"], [longer, longer | {"steps": 7}]
    )
    assert [*found] == ["ModernBERT", "ModernBERT, 900 steps"]
    assert reports.half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5, rel=1e-3)


def test_a_padded_row_gives_the_softmax_twin_what_the_bare_one_gives(module):
    """The peer is right too: it sees no padding, neither in its convolutions nor its scores."""
    arms = module("learning_arms")
    model = arms.ARMS["softmax twin"](8192, 32).base_model.eval()
    ids = torch.arange(10, 22)[None]
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 12 + [0] * 5])
    with torch.no_grad():
        bare = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        found = model(input_ids=padded, attention_mask=mask).last_hidden_state[:, :12]
    torch.testing.assert_close(found, bare)


def test_gpu_steps_go_on_where_they_stopped(module, tmp_path):
    """Done steps are not done again; failed and slow ones are named, logged and tried again."""
    gpu = module("gpu")
    mark = tmp_path / "mark"
    python = (sys.executable, "-c")
    write = f"open({str(mark)!r}, 'a').write('x')"
    todo = [
        gpu.Step("good", (*python, write), 1),
        gpu.Step("bad", (*python, "raise SystemExit(3)"), 1),
        gpu.Step("slow", (*python, "import time; time.sleep(60)"), 0.02),
    ]
    assert gpu.run(todo, tmp_path, 5, {"device": "none"}) == ["bad", "slow"]
    assert gpu.run(todo[:2], tmp_path, 5, {}) == ["bad"]
    assert mark.read_text() == "x"
    lines = (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()
    results = [(json.loads(line)["step"], json.loads(line)["result"]) for line in lines]
    assert results == [("good", 0), ("bad", 3), ("slow", "stopped after 1 s"), ("bad", 3)]
    assert gpu.run([todo[1]], tmp_path, 0, {}) == ["bad"]


def test_gpu_steps_name_files_and_suites_that_exist(module, tmp_path):
    gpu, suites = module("gpu"), [*module("run").SUITES, "blocks"]
    for step in gpu.steps(tmp_path):
        files = [part for part in step.command if part.endswith(".py")]
        assert files and all((gpu.ROOT / file).is_file() for file in files)
        assert "run.py" not in step.command[1] or step.command[2] in suites
    assert sum(step.minutes for step in gpu.steps(tmp_path)) < 45
