"""The site builds strictly, has every public name once, names only files that are there, and its programs run."""

import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import palettax
import palettax.coreml
import palettax.plot
import palettax.torch
from tests.markdown import blocks_of, run_blocks

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PROGRAMS = [page for page in PAGES if blocks_of(page)]
MODULES = (palettax, palettax.torch, palettax.coreml, palettax.plot)

pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning")


def name_of(page):
    return str(page.relative_to(DOCS))


def public_objects(module):
    """By name, what a module makes public; what it imports from elsewhere is not its own."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("palettax") and callable(value)
    }


def documented(page):
    """The objects that a page has directives for; a module stands for all that it makes public."""
    for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
        found = resolved(path)
        yield from public_objects(found).values() if isinstance(found, ModuleType) else [found]


def resolved(path):
    """What a dotted path stands for: the longest module that there is, and its attributes from there."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def test_every_public_name_is_on_one_page():
    times = Counter(id(found) for page in PAGES for found in documented(page))
    wrong = {
        f"{module.__name__}.{name}": times[id(value)]
        for module in MODULES
        for name, value in public_objects(module).items()
        if times[id(value)] != 1
    }
    assert not wrong
    assert all(map(public_objects, MODULES))
    assert set(times.values()) == {1}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_is_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"`((?:experiments|notebooks|palettax|tests)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PROGRAMS, ids=name_of)
def test_programs_print_what_is_printed(page, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = re.findall(r"[\w/]+\.md", navigation)
    assert sorted(listed) == sorted(map(name_of, PAGES))


def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "api" / "plot" / "index.html").stat().st_size > 0
