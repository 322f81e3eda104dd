"""What is released: built from a copy, checked, and installed into a fresh environment that opens adapters."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import peft_mora


ROOT = Path(__file__).parent.parent
PARTS = ("peft_mora", "trl_callbacks", "peft_mora_autoload.py", "peft_mora_command.py")


def test_the_version_is_said_once_and_the_citation_and_the_changelog_follow():
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text("utf-8")
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)[1]
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[1]
    assert {cited, newest} == {peft_mora.__version__}


def test_forms_and_the_citation_are_yaml_with_what_their_readers_need():
    forms = [yaml.safe_load(path.read_text("utf-8")) for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").iterdir())]
    bug, config, method = forms
    assert config.keys() == {"blank_issues_enabled"}
    for form in (bug, method):
        assert {"name", "description", "body"} <= form.keys()
        assert all({"type", "attributes"} <= part.keys() for part in form["body"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()


def run(*command, cwd, **environment) -> str:
    """In a shell that knows nothing of this checkout."""
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    found = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**outside, **environment}, capture_output=True, text=True, timeout=280
    )
    assert found.returncode == 0, f"{found.stdout[-3000:]}\n{found.stderr[-3000:]}"
    return found.stdout


@pytest.mark.slow
def test_the_wheel_in_a_fresh_environment_opens_adapters_without_an_import(tmp_path):
    kept = shutil.ignore_patterns(".*", "out", "build", "dist", "site", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=kept)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", cwd=tmp_path / "copy")
    wheel, source = (next((tmp_path / "dist").glob(end)) for end in ("*.whl", "*.tar.gz"))
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, source, cwd=tmp_path)
    assert f"-{peft_mora.__version__}-" in wheel.name

    files = {str(path.relative_to(ROOT)) for part in PARTS for path in [ROOT / part, *(ROOT / part).rglob("*")]}
    wanted = {name for name in files if name.endswith((".py", "py.typed"))}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == wanted
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted | {"tests/helpers.py", "recipes/demo.py", "docs/mora.md", "CHANGELOG.md"} <= names

    venv.create(tmp_path / "venv")  # the hosts from here, without what else is installed in an editable way
    python = tmp_path / "venv/bin/python"
    hosts = sysconfig.get_paths()["purelib"]
    pip = "-m pip --python venv/bin/python install -q --no-deps --no-index".split()
    run(sys.executable, *pip, wheel, cwd=tmp_path)
    there = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip())
    (there / "hosts.pth").write_text(f"{hosts}\n")
    where = run(python, "-c", "import peft_mora, trl_callbacks; print(peft_mora.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(there)
    told = run(tmp_path / "venv/bin/peft-mora", "--version", cwd=tmp_path)
    assert told.strip() == peft_mora.__version__
    tests = ROOT / "tests/test_autoload.py"
    options = ["-q", "-p", "no:cacheprovider", "-m", "", "-k", "names_neither or switched_off"]  # slow ones as well
    assert "2 passed" in run(python, "-m", "pytest", tests, *options, cwd=tmp_path)
