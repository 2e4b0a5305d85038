"""The container's recipe names what there is: files, extras, versions, the command."""

import re
import tomllib

import pytest
import yaml


@pytest.fixture
def recipe(repository) -> list[tuple[str, str]]:
    """Instructions and what they say, in order."""
    text = (repository / "scripts/cluster/Containerfile").read_text()
    joined = re.sub(r"\\\n\s*", "", text)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


@pytest.fixture
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())


def said(recipe, instruction):
    return [rest for name, rest in recipe if name == instruction]


def test_what_is_copied_is_there_and_all_that_is_built_from(recipe, repository, project):
    copied = [word for rest in said(recipe, "COPY") for word in rest.split()[:-1]]
    assert [name for name in copied if not (repository / name).exists()] == []
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"]}
    assert folders | files | set(project["project"]["license-files"]) == set(copied)


def test_the_extras_exist(recipe, project):
    (install,) = said(recipe, "RUN")[:1]
    assert install.startswith("pip install --no-cache-dir --constraint constraints.txt ")
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', install)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


def test_the_command_exists(recipe, project):
    (command,) = said(recipe, "CMD")
    assert yaml.safe_load(command)[0] in project["project"]["scripts"]


def test_the_manifest_runs_this_image(recipe, repository, project):
    documents = yaml.safe_load_all((repository / "scripts/cluster/rayjob.yaml").read_text())
    (job,) = (document["spec"] for document in documents if document["kind"] == "RayJob")
    cluster = job["rayClusterSpec"]
    arguments = dict(rest.split("=", 1) for rest in said(recipe, "ARG"))
    assert arguments["RAY_VERSION"] == cluster["rayVersion"]
    templates = [
        job["submitterPodTemplate"],
        *(group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]),
    ]
    image = f"sparsemem:{project['project']['version']}"
    assert {c["image"] for pod in templates for c in pod["spec"]["containers"]} == {image}
    (user,) = said(recipe, "USER")
    contexts = [pod["spec"]["securityContext"] for pod in templates]
    assert {f"{c['runAsUser']}:{c['runAsGroup']}" for c in contexts} == {user}
