"""The layout of the package: which room may import which, and how long files and functions are.

CONTRIBUTING.md names the rooms and the rules. A new file needs no line here: it belongs to the room
of its folder.
"""

import ast
from collections import Counter

from support.sources import ROOT, imports, module, tracked, tree

# From top to bottom: a file imports from its own room and from the rooms below it.
BESIDE = ()  # the other files beside the rooms: hub, auto, timm_models, presets, plots, folders
ROOMS = (
    ("lion_hf", "lion_hf.cli", "lion_hf.__main__"),
    ("lion_hf.tasks",),
    ("lion_hf.linearize",),
    ("lion_hf.convert",),
    ("lion_hf.training",),
    ("lion_hf.data",),
    BESIDE,
    ("lion_hf.modeling",),
)
GROUND_FLOOR = "lion_hf.modeling.configuration_lion"  # imports nothing of ours
MAIN_FILES = {"lion_hf/convert/__main__.py"}  # `python -m` of a room calls the command line
LONGEST_FUNCTION = 50  # lines without signature and docstring
MOST_ARGUMENTS = 8  # positional ones
DEEPEST_NESTING = 4
LONGEST_FILE = 450
LONGEST_KERNEL_FILE = 600  # lion_triton*.py

PACKAGE = tuple(file for file in tracked("lion_hf/*.py") if file not in MAIN_FILES)
MODULES = {module(file): file for file in PACKAGE}
SOURCES = tracked("lion_hf/*.py", "run_scripts/*.py", "benchmarks/*.py", "examples/*.py")
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def room(name: str) -> int:
    """The number of a module's room, counted from the top."""
    folder = name.rpartition(".")[0] if name.count(".") > 1 else name
    return next((n for n, names in enumerate(ROOMS) if folder in names), ROOMS.index(BESIDE))


def imported(name: str) -> set[str]:
    """The modules of ours that a module imports."""
    return (imports(MODULES[name]) & set(MODULES)) - {name, "lion_hf"}


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Everything that a module imports, directly or not."""
    seen, waiting = set(), [start]
    while waiting:
        for other in graph[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def is_face(name: str) -> bool:
    return MODULES[name].endswith("__init__.py")


def functions() -> list[tuple[str, ast.FunctionDef, str]]:
    """Every function with its place and its decorators."""
    return [
        (f"{file}: {node.name}", node, " ".join(map(ast.unparse, node.decorator_list)))
        for file in SOURCES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef)
    ]


def length(function: ast.FunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def depth(node: ast.AST, level: int = 0) -> int:
    """How deep blocks are nested. An elif counts as its if, and inner functions on their own."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, depth(child, level + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def test_no_file_reaches_itself():
    """The faces (`__init__.py`) apart, which list the names of the files around them."""
    files = {name for name in MODULES if not is_face(name)}
    graph = {name: imported(name) & files for name in files}
    assert [name for name in sorted(files) if name in reachable(name, graph)] == []


def test_imports_point_down():
    up = {
        name: [other for other in imported(name) if room(other) < room(name)]
        for name in MODULES
        if name != "lion_hf"  # the package's own face lists names of all rooms
    }
    assert {name: others for name, others in up.items() if others} == {}


def test_the_configuration_is_the_ground_floor():
    assert imported(GROUND_FLOOR) == set()


def test_files_that_travel_import_each_other_by_name():
    """transformers copies them flat to the Hub, and finds `from .name import x` only."""
    wrong = [
        f"{file}:{node.lineno}"
        for file in PACKAGE
        if file.startswith("lion_hf/modeling/")
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ImportFrom)
        and (node.level or (node.module or "").startswith("lion_hf"))
        and (node.level != 1 or not node.module or "." in node.module)
    ]
    assert wrong == []


def test_no_module_imports_a_script():
    assert not [file for file in PACKAGE if any("run_scripts" in name for name in imports(file))]


def test_names_of_test_files_are_unique():
    """pytest takes two of one name for the same module, and runs neither."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_files_are_short():
    sizes = {file: (ROOT / file).read_text(encoding="utf-8").count("\n") for file in SOURCES}
    limits = {
        file: LONGEST_KERNEL_FILE if "/lion_triton" in file else LONGEST_FILE for file in SOURCES
    }
    assert {file: size for file, size in sizes.items() if size > limits[file]} == {}


def test_functions_are_short_and_flat():
    """Kernels apart, which are one loop each."""
    sizes = {
        place: (length(function), depth(function))
        for place, function, decorators in functions()
        if "jit" not in decorators
    }
    assert len(sizes) > 500
    assert {
        place: size
        for place, size in sizes.items()
        if size[0] > LONGEST_FUNCTION or size[1] > DEEPEST_NESTING
    } == {}


def test_functions_take_few_arguments():
    """Kernels and torch's operators apart, which cannot take objects, and a module's `forward`."""
    counts = {
        place: sum(
            argument.arg not in ("self", "cls")
            for argument in function.args.posonlyargs + function.args.args
        )
        for place, function, decorators in functions()
        if function.name not in ("forward", "__init__")
        and not any(word in decorators for word in ("jit", "custom_op", "triton_op", "register_"))
    }
    assert {place: count for place, count in counts.items() if count > MOST_ARGUMENTS} == {}


def test_every_script_is_a_thin_front():
    """Its docstring, an import, and the call."""
    scripts = tracked("run_scripts/*.py")
    assert scripts
    for file in scripts:
        docstring, *rest = tree(file).body
        assert isinstance(docstring, ast.Expr) and len(rest) == 2, file
        assert "lion_hf.cli" in imports(file), file
