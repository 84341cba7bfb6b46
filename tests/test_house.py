"""The rules of the house, checked: what each file may hold, import and name."""

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PACKAGES = ("metarisk_common", "server", "client", "simulations")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

MAX_LINES = 350
FLOWER_PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
# Torch's and NumPy's generators: not one of them is cryptographic.
TORCH_RANDOM = re.compile(r"torch\.(rand\w*|normal|bernoulli|multinomial|poisson|manual_seed|Generator|random\b.*)")
TENSOR_RANDOM = {"bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_"}
# Brackets keep these patterns from finding themselves.
UNFINISHED = re.compile(r"\b(TO[D]O|FIX[M]E|XX[X]|place[h]older|NotImplemented[E]rror|not implemen[t]ed)\b")
MACHINE = re.compile(
    r"(?<![\w.])/(home|work|root|tmp|var/tmp|Users)/"  # a path of somebody's machine
    r"|file:[/]{2}|[-]-(extra-)?index-url|[-]-find-links|pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org"
)

# What a dependency that no module imports is for.
NOT_IMPORTED: dict[str, str] = {
    "grpcio": "part of the stack the project was given; flwr loads it, and this holds it at a version that was tested",
}


@functools.cache
def tracked() -> tuple[Path, ...]:
    """Every file that is, or would be, in the repository, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return tuple(sorted(path for name in listing.split("\0") if name and (ROOT / (path := Path(name))).is_file()))


def modules(*folders: str) -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py" and path.parts[0] in folders]


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def parse(path: Path) -> ast.Module:
    """The module's tree, in the grammar of the oldest Python that it must run on."""
    return ast.parse(read(path), filename=str(path), feature_version=(3, 11))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import, wherever it stands; `from a import b` yields `a`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of attributes; where it starts with something else, what follows that."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed([*names, node.id] if isinstance(node, ast.Name) else names))


# Rules on one module's tree: each yields (line, what was found).


def non_public_flower(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, name in imports(tree):
        if name.split(".")[0] == "flwr" and name not in FLOWER_PUBLIC:
            yield line, name


def unsafe_loading(tree: ast.Module) -> Iterator[tuple[int, str]]:
    yield from ((line, name) for line, name in imports(tree) if name.split(".")[0] in PICKLES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) in {"torch.load", "torch.save"}:
            yield node.lineno, dotted(node)
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in {"load", "save"})
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield node.value.lineno, "allow_pickle"


def plain_randomness(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, name in imports(tree):
        if name == "random" or name.startswith(("numpy.random", "torch.random", "torch.distributions")):
            yield line, name
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in {"numpy", "torch"}:
            for alias in node.names:
                if alias.name == "random" or TORCH_RANDOM.fullmatch(f"torch.{alias.name}"):
                    yield node.lineno, f"{node.module}.{alias.name}"
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if name in {"np.random", "numpy.random"} or TORCH_RANDOM.fullmatch(name) or node.attr in TENSOR_RANDOM:
                yield node.lineno, name


Rule = Callable[[ast.Module], Iterator[tuple[int, str]]]


def findings(rule: Rule, paths: list[Path]) -> list[str]:
    return [f"{path}:{line}: {found}" for path in paths for line, found in rule(parse(path))]


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (non_public_flower, "from flwr.server.grid import Grid"),
        (non_public_flower, "def late():\n    import flwr.common"),
        (non_public_flower, "import flwr"),
        (unsafe_loading, "import pickle"),
        (unsafe_loading, "from torch import load"),
        (unsafe_loading, "model = torch.load(path)"),
        (unsafe_loading, "values = np.load(path, allow_pickle=True)"),
        (plain_randomness, "from random import shuffle"),
        (plain_randomness, "from numpy import random"),
        (plain_randomness, "from torch import randn_like"),
        (plain_randomness, "noise = np.random.default_rng(1).normal()"),
        (plain_randomness, "noise = torch.randn(3)"),
        (plain_randomness, "torch.empty(3).normal_()"),
    ],
)
def test_a_rule_bites(rule: Rule, source: str) -> None:
    assert list(rule(ast.parse(source)))


def test_the_patterns_bite() -> None:
    assert MACHINE.search('open("/' + 'home/me/loans.csv")')
    assert MACHINE.search("-e file:" + "//somewhere/metarisk")
    assert not MACHINE.search("runs/work/today and /var/lib/metarisk")
    assert UNFINISHED.search("# TO" + "DO: later")


def test_only_three_files_import_what_flower_does_not_publish() -> None:
    allowed = {Path(f"metarisk_common/flower_{name}.py") for name in ("compat", "deployment", "grid")}
    assert findings(non_public_flower, [path for path in modules(*PACKAGES) if path not in allowed]) == []


def test_nothing_is_unpickled() -> None:
    assert findings(unsafe_loading, modules(*PACKAGES)) == []


def test_a_bank_draws_only_from_the_csprng() -> None:
    assert findings(plain_randomness, modules("client")) == []


def test_the_layers_hold() -> None:
    command = [str(BIN / "lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_file_says_one_thing() -> None:
    lengths = {str(path): len(read(path).splitlines()) for path in tracked() if path.suffix == ".py"}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}
    assert [path for path in lengths if Path(path).name in {"utils.py", "util.py", "helpers.py", "misc.py"}] == []


def test_every_module_says_what_it_is() -> None:
    assert [str(path) for path in modules(*PACKAGES) if not ast.get_docstring(parse(path))] == []
    assert [package for package in PACKAGES if not (ROOT / package / "py.typed").is_file()] == []


def test_folders_are_flat_and_tests_are_no_packages() -> None:
    assert [str(path) for path in modules(*PACKAGES) if len(path.parts) > 2] == []
    assert [str(path) for path in modules("tests") if path.name == "__init__.py"] == []


@pytest.mark.parametrize("pattern", [UNFINISHED, MACHINE], ids=["unfinished", "machine"])
def test_no_file_holds(pattern: re.Pattern[str]) -> None:
    texts = [path for path in tracked() if b"\0" not in (ROOT / path).read_bytes()]
    found = [
        f"{path}:{number}: {match[0]}"
        for path in texts
        for number, line in enumerate(read(path).splitlines(), start=1)
        if (match := pattern.search(line))
    ]
    assert found == []


# The distribution: what pyproject.toml says is what is there.


def normal(requirement: str) -> str:
    """The normalised name of a distribution or a requirement."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def imported(*folders: str) -> set[str]:
    """The distributions that the modules of these folders import; the standard library and our own are left out."""
    distributions = packages_distributions()
    roots = {name.split(".")[0] for path in modules(*folders) for _, name in imports(parse(path))}
    foreign = roots - sys.stdlib_module_names - set(PACKAGES)
    return {normal(distributions[root][0]) if root in distributions else root for root in foreign}


def declared(*extras: str) -> set[str]:
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {normal(requirement) for group in groups for requirement in group}


def test_the_version_is_the_installed_one() -> None:
    assert version(PROJECT["name"]) == PROJECT["version"]


def test_what_is_imported_is_declared() -> None:
    ray = {"ray"}  # comes with the extra of that name, through flwr[simulation]
    assert imported("metarisk_common", "server", "client") - declared() - ray == set()
    assert imported("simulations") - declared("sim") == set()
    assert imported("tests") - declared("sim", "dev") - ray == set()


def test_what_is_declared_is_used() -> None:
    unused = declared("sim") - imported(*PACKAGES)
    assert unused == set(NOT_IMPORTED)


def test_the_lock_pins_every_dependency() -> None:
    lines = [line for line in read(Path("requirements.lock")).splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)] == []
    pinned = {normal(line): line.split("==")[1] for line in lines}
    assert declared("sim", "ray", "dev") - set(pinned) == set()
    assert {
        name: pin for name, pin in pinned.items() if name in declared() and version(name).split("+")[0] != pin
    } == {}


@functools.cache
def help_of(script: str) -> str:
    """What `script --help` prints, with room for whole lines."""
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run([BIN / script, "--help"], env=environment, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_a_command_explains_itself(script: str) -> None:
    assert "Usage" in help_of(script)


def test_the_commands_of_the_readme_exist() -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", read(Path("README.md")), flags=re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix("$ ").split() for block in blocks for line in block.splitlines()]
    targets = set(re.findall(r"^([a-z]+):", read(Path("Makefile")), flags=re.MULTILINE))
    asked = [words for words in lines if words and (words[0] == "make" or words[0].startswith("metarisk-"))]
    assert asked
    for command, *arguments in asked:
        verbs = [word for word in arguments if not word.startswith("-") and "=" not in word]
        if command == "make":
            assert set(verbs) <= targets, f"make {verbs}"
        else:
            assert command in PROJECT["scripts"], command
            assert not verbs or re.search(rf"^\W*{verbs[0]}\b", help_of(command), flags=re.MULTILINE), arguments


def test_the_tests_that_the_documents_name_exist() -> None:
    named = {(path, *found) for path in tracked() if path.suffix == ".md" and path.parts[0] == "docs"
             for found in re.findall(r"`([\w/]+\.py)::(\w+)`", read(path))}  # fmt: skip
    assert named
    missing = [
        f"{document}: {file}::{test}"
        for document, file, test in named
        if not (ROOT / "tests" / file).is_file() or f"def {test}(" not in read(Path("tests") / file)
    ]
    assert missing == []
