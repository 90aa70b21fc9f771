"""The rules of the house that a machine can check. Reads source files as text and syntax trees; runs no engine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "kontextd_server": ROOT / "server/kontextd_server",
    "kontextd_models": ROOT / "models/kontextd_models",
    "kontextd_kernels": ROOT / "kernels/kontextd_kernels",
}
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "onnxruntime"}
# Imports point one way: server -> models -> kernels.
FORBIDDEN_IMPORTS = {
    "kontextd_server": HEAVY | {"kontextd_kernels"},
    "kontextd_models": {"kontextd_server", "fastapi", "starlette", "uvicorn"},
    "kontextd_kernels": {"kontextd_server", "kontextd_models"},
}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
MAX_FUNCTION_LINES = {"kontextd_server": 60, "kontextd_models": 60, "kontextd_kernels": 100}
MAX_FILE_LINES = 400

Rule = Callable[[ast.Module], Iterator[tuple[int, str]]]


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


ALL_SOURCES = [path for package in PACKAGES for path in sources(package)]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def findings(rule: Rule, paths: list[Path]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line}: {what}" for path in paths for line, what in rule(parsed(path))]


# The rules: each yields (line, what is wrong) for one syntax tree.


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:  # a relative import cannot leave its package
            yield node.lineno, (node.module or "").split(".")[0]


def unpickling(tree: ast.Module) -> Iterator[tuple[int, str]]:
    yield from ((line, f"imports {name}") for line, name in imported_modules(tree) if name in UNPICKLERS)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield node.lineno, "torch.load"
            case ast.ImportFrom(module="torch", names=names) if any(alias.name == "load" for alias in names):
                yield node.lineno, "from torch import load"
            case ast.keyword(arg="allow_pickle" | "trust_remote_code", value=value) if not is_false(value):
                yield node.lineno, f"{node.arg} is not False"
            case ast.keyword(arg="use_safetensors", value=value) if not is_true(value):
                yield node.lineno, "use_safetensors is not True"


def running_text(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNS_TEXT:
            yield node.lineno, f"{node.func.id}()"


def environment_read_at_import(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in runs_at_import(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in {"environ", "environb", "getenv"}:
                yield node.lineno, f"{name} at import"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def runs_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run when the module is imported: not the bodies of functions, nor of `if __name__ == …`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Lambda):
            continue
        if isinstance(child, ast.If) and "__name__" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            header = [*child.decorator_list, *child.args.defaults, *filter(None, child.args.kw_defaults)]
            for part in header:
                yield from ast.walk(part)
            continue
        yield child
        yield from runs_at_import(child)


def too_long(limit: int) -> Rule:
    def rule(tree: ast.Module) -> Iterator[tuple[int, str]]:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > limit:
                    yield node.lineno, f"{node.name} has {lines} lines; the most allowed is {limit}"

    return rule


# The tests.


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_from_server_to_models_to_kernels(package: str) -> None:
    wrong = FORBIDDEN_IMPORTS[package]

    def rule(tree: ast.Module) -> Iterator[tuple[int, str]]:
        return ((line, f"imports {name}") for line, name in imported_modules(tree) if name in wrong)

    assert sources(package)
    assert findings(rule, sources(package)) == []


def test_nothing_is_ever_unpickled_and_no_code_of_a_model_folder_runs() -> None:
    assert findings(unpickling, ALL_SOURCES) == []


def test_no_text_is_run_as_code() -> None:
    assert findings(running_text, ALL_SOURCES) == []


def test_the_environment_is_not_read_at_import() -> None:
    assert findings(environment_read_at_import, ALL_SOURCES) == []


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (unpickling, "import pickle"),
        (unpickling, "def f():\n    from joblib import load"),
        (unpickling, "import torch\nx = torch.load('x')"),
        (unpickling, "read = torch.load"),
        (unpickling, "from torch import load"),
        (unpickling, "f(trust_remote_code=True)"),
        (unpickling, "f(trust_remote_code=setting)"),
        (unpickling, "numpy.load(path, allow_pickle=True)"),
        (unpickling, "from_pretrained(path, use_safetensors=False)"),
        (running_text, "eval('1')"),
        (running_text, "def f(x):\n    exec(x)"),
        (environment_read_at_import, "import os\nHOME = os.environ['HOME']"),
        (environment_read_at_import, "import os\nif os.getenv('X'):\n    pass"),
        (environment_read_at_import, "import os\nclass Settings:\n    home = os.environ.get('HOME')"),
        (environment_read_at_import, "import os\ndef f(home=os.environ['HOME']):\n    pass"),
        (too_long(3), "def f():\n    a = 1\n    b = 2\n    return a + b"),
    ],
)
def test_each_rule_finds_what_it_forbids(rule: Rule, text: str) -> None:
    assert list(rule(ast.parse(text)))


def test_the_rules_let_lawful_code_pass() -> None:
    text = "import os\ndef f():\n    return os.environ['HOME'], re.compile('x')\nmodel.eval()\nload_file(path)"
    tree = ast.parse(text)
    assert [found for rule in (unpickling, running_text, environment_read_at_import) for found in rule(tree)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_and_files_are_short(package: str) -> None:
    assert findings(too_long(MAX_FUNCTION_LINES[package]), sources(package)) == []
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in ALL_SOURCES}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_every_module_says_what_it_is() -> None:
    silent = [path for path in ALL_SOURCES if not ast.get_docstring(parsed(path))]
    assert [str(path.relative_to(ROOT)) for path in silent] == []


def test_importing_the_command_line_and_the_engine_door_imports_nothing_heavy() -> None:
    code = f"import sys, kontextd_models, kontextd_server.cli; print(sorted({HEAVY!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


# Dependencies.


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[0-9][^\s*+]*", line)] == []
    return dict(line.split("==") for line in lines)


def declared(*extras: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]
    return {normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def test_everything_that_is_installed_is_pinned() -> None:
    ours_or_bundled_with_python = {"kontextd", "pip"}
    here = distributions(path=[sysconfig.get_path("purelib")])  # setuptools puts packages of its own on the path
    installed = {normalised(found.name): found.version.split("+")[0] for found in here}
    assert "torch" in installed
    loose = {name: version for name, version in installed.items() if pins().get(name) != version}
    assert {name: loose[name] for name in loose.keys() - ours_or_bundled_with_python} == {}


def test_everything_that_is_declared_is_pinned() -> None:
    assert declared("dev", "kernels") - pins().keys() == set()


def test_everything_that_the_packages_import_is_declared() -> None:
    origin = packages_distributions()
    lawful = declared("kernels")
    undeclared = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in ALL_SOURCES
        for line, name in imported_modules(parsed(path))
        if name not in sys.stdlib_module_names
        and name not in PACKAGES
        and not lawful & {normalised(distribution) for distribution in origin.get(name, [name])}
    ]
    assert undeclared == []


def test_the_wheel_carries_every_file_of_the_packages() -> None:
    """The demonstration model and its photo too: hatchling leaves out what git ignores, and says nothing."""
    carried = {Path(found.path) for found in WheelBuilder(str(ROOT)).recurse_included_files()}
    files = {path for folder in PACKAGES.values() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in files - carried if "__pycache__" not in path.parts} == set()
    assert {path.suffix for path in carried} >= {".py", ".jpg"}


# What a newcomer reads.


def tree_of_readme() -> set[str]:
    """The paths of the README's tree: a block of `path  phrase` lines, indented two spaces a folder."""
    block = re.search(r"## The repository\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert block, "README.md has no section 'The repository' with a tree in a code block"
    paths: set[str] = set()
    folders: list[str] = []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, phrase = line.strip().partition("  ")
        assert phrase.strip(), f"no phrase says what {name} is"
        folders = [*folders[:depth], name]
        paths.add("".join(folders))
    return paths


def test_the_tree_in_the_readme_lists_every_file_and_nothing_else() -> None:
    listed = tree_of_readme()
    assert [path for path in sorted(listed) if not (ROOT / path).exists()] == []
    scripts_and_docs = [path for folder in ("scripts", "docs", "benchmarks") for path in (ROOT / folder).glob("*.*")]
    expected = {str(path.relative_to(ROOT)) for path in [*ALL_SOURCES, *scripts_and_docs]}
    empty_inits = {path for path in expected if path.endswith("__init__.py")}
    assert expected - empty_inits - listed == set()


def test_make_help_lists_every_target() -> None:
    targets = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())
    assert targets
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^make (\S+)", shown, re.M) == targets[1].split()


def test_continuous_integration_runs_what_a_developer_runs() -> None:
    assert re.search(r"^make check test$", (ROOT / ".ci/run").read_text(), re.M)
