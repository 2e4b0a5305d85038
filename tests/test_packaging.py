"""What is shipped, what an import pulls in, and which way dependencies point."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jaxtyping
import pytest
import torch

from sparsemem.models.controller import LSTMController

FOLDERS = {  # in the repository -> in the package
    "sparsemem": "sparsemem",
    "indexes": "sparsemem/indexes",
    "distributed": "sparsemem/distributed",
}


def shipped_files(root: Path) -> dict[str, Path]:
    """Every file of the library: its name in the wheel and where it lies in the tree."""
    files = {}
    for folder, package in FOLDERS.items():
        for path in (root / folder).rglob("*"):
            inside = path.relative_to(root / folder)
            if path.is_file() and "__pycache__" not in inside.parts:
                files[f"{package}/{inside.as_posix()}"] = path
    return files


def modules(root: Path) -> dict[str, Path]:
    """Every module of the library by its dotted name."""
    return {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
        for name, path in shipped_files(root).items()
        if name.endswith(".py")
    }


def run_python(code: str, folder: Path, cwd: Path) -> str:
    """Run `code` in a fresh interpreter that finds sparsemem in `folder`."""
    script = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory) -> Path:
    """A wheel built, without the network, from a copy (building leaves files behind)."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repository / folder, source / folder, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    target = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", target, source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_exactly_the_tree(repository, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set(shipped_files(repository))
    assert "sparsemem/py.typed" in names


def test_the_wheel_names_its_command_and_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {
            name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name
        }
        entry_points = archive.read(texts["entry_points.txt"]).decode()
        metadata = archive.read(texts["METADATA"]).decode()
    assert "sparsemem = sparsemem.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata
    assert "licenses/LICENSE" in texts


def test_the_wheel_is_imported_without_the_tree_and_pulls_in_nothing_heavy(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sparsemem\n"
        "heavy = {'ray', 'faiss', 'numba', 'triton', 'matplotlib', 'tensorboard', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "import sparsemem.indexes, sparsemem.distributed as d\n"
        "print(sparsemem.__file__, sparsemem.indexes.__file__, d.__file__, sep='\\n')"
    )
    heavy, *lines = run_python(code, tmp_path, tmp_path).splitlines()
    expected = [tmp_path / package / "__init__.py" for package in FOLDERS.values()]
    assert lines == [str(path) for path in expected]
    assert heavy == "[]"


def test_the_links_lead_to_the_folders(repository):
    for folder in ("indexes", "distributed"):
        assert (repository / "sparsemem" / folder).readlink() == Path("..") / folder


@pytest.mark.parametrize("name", ["indexes", "distributed"])
def test_a_bare_name_is_refused(name, repository, tmp_path):
    code = f"try:\n    import {name}\nexcept ImportError as error:\n    print(error)"
    expected = f"import this package as sparsemem.{name}, not as {name}"
    assert run_python(code, repository, tmp_path).strip() == expected


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """Dotted names that `source`, the text of `module`, imports anywhere, also in functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            drop = node.level - is_package
            parents = base[: len(base) - drop] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def is_inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def forbidden(module: str, name: str) -> bool:
    """True if `module` of the library must not import `name`."""
    if any(is_inside(name, outside) for outside in ("scripts", "indexes", "distributed", "tests")):
        return True
    if not is_inside(name, "sparsemem") or is_inside(module, "sparsemem.distributed"):
        return False
    if is_inside(module, "sparsemem.indexes"):
        return not any(is_inside(name, leaf) for leaf in ("sparsemem.indexes", "sparsemem.checks"))
    # The command line stands on top of all.
    return is_inside(name, "sparsemem.distributed") and module != "sparsemem.cli"


def test_dependencies_point_one_way(repository):
    found = [
        (module, name)
        for module, path in modules(repository).items()
        for name in imported(path.read_text(), module, path.name == "__init__.py")
        if forbidden(module, name)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source", "refused"),
    [
        ("sparsemem.indexes.exact", "from sparsemem.memory import Episode", True),
        ("sparsemem.indexes.exact", "from sparsemem import checks", False),
        ("sparsemem.indexes.exact", "from sparsemem.bank import MemoryBank", True),
        ("sparsemem.indexes.exact", "from ..memory.episode import Episode", True),
        ("sparsemem.indexes.exact", "from . import ranking", False),
        ("sparsemem.indexes.exact", "import torch, sparsemem.indexes.ranking", False),
        ("sparsemem.models.sam", "def f():\n    import sparsemem.distributed.bank", True),
        ("sparsemem.models.sam", "from .. import distributed", True),
        ("sparsemem.models.sam", "import scripts.tool", True),
        ("sparsemem.models.sam", "from sparsemem.indexes import ranking", False),
        ("sparsemem.distributed.bank", "from sparsemem.memory import bank", False),
    ],
)
def test_the_dependency_check_sees_every_form_of_import(module, source, refused):
    names = imported(source, module, is_package=False)
    assert any(forbidden(module, name) for name in names) == refused


def reached_extras(extras: dict[str, list[str]], name: str) -> set[str]:
    """Names of the packages that an extra installs, through sparsemem's own extras too."""
    packages = set()
    for requirement in extras[name]:
        own = re.fullmatch(r"sparsemem\[(.+)\]", requirement)
        if own:
            packages |= set().union(*(reached_extras(extras, x) for x in own[1].split(",")))
        else:
            packages.add(re.match(r"[\w.-]+", requirement)[0])
    return packages


def test_no_extra_installs_both_builds_of_faiss(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(extras) == {"cpu", "gpu", "ray", "viz", "test", "dev"}
    packages = {name: reached_extras(extras, name) for name in extras}
    assert [n for n, found in packages.items() if "faiss-cpu" in found] == ["cpu", "test", "dev"]
    assert [n for n, found in packages.items() if "faiss-gpu" in found] == ["gpu"]


def test_the_changelog_knows_the_version(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert f"## [{project['version']}]" in (repository / "CHANGELOG.md").read_text()


def readme_examples(repository) -> list[dict[str, object]]:
    """The names that each example of the README leaves behind."""
    examples = re.findall(r"```python\n(.+?)```", (repository / "README.md").read_text(), re.S)
    results: list[dict[str, object]] = [{} for _ in examples]
    for example, names in zip(examples, results, strict=True):
        exec(compile(example, "README.md", "exec"), names)
    return results


def test_the_readme_examples_run(repository):
    model, bank = readme_examples(repository)
    assert model["output"].shape == (16, 10, 8)
    assert all(p.grad is not None for p in model["model"].parameters())
    assert torch.isfinite(model["loss"])
    assert bank["hit"].values.shape == (16, 8, 32)
    assert bank["bank"].stats()["num_live"] == 99_990
    assert bank["bank"].values.grad._nnz() > 0
    bank["bank"].close()


def test_annotations_are_executed():
    # If the import hook of conftest.py missed the library, every shape would pass unseen.
    with pytest.raises(jaxtyping.TypeCheckError, match="input"):
        LSTMController(2, 3)(torch.zeros(2))
