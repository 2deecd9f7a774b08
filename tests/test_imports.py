"""What imports what, what `import palettax` costs, and that every example in a docstring runs."""

import ast
import doctest
import importlib
import inspect
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import palettax as px

ROOT = Path(px.__file__).parent
# A module imports only from the levels above its own, or from its own package.
LEVELS = [
    {"_typing", "_paths", "_names", "_extras", "_replaced", "_files", "_progress"},
    {"_keys"},
    {"_running"},
    {"clustering"},
    {"leaf"},
    {"transforms"},
    {"sensitivity"},
    {"palettize"},
    {"report"},
    {"checkpoint"},
    {"activations", "torch"},
    {"coreml"},
    {"plot"},
    {"demo"},
    {"_commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
EDGE = {name for names in LEVELS[LEVEL["coreml"] + 1 :] for name in names}
OPTIONAL = {
    "torch",
    "coremltools",
    "stablehlo_coreml",
    "flax",
    "optax",
    "matplotlib",
    "sklearn",
    "pandas",
    "rich",
    "typer",
}


def module_name(path):
    parts = ("palettax", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def family(module):
    """The part of the library a module belongs to: the name under `palettax`."""
    return module.split(".")[1] if "." in module else ""


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def required(path):
    """Modules named in `require("name", ...)`: imports in all but name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require" and path.name != "_extras.py":
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


inner = pytest.mark.parametrize("module", [m for m in MODULES if m != "palettax"])


@inner
def test_every_module_has_a_level(module):
    assert family(module) in LEVEL


@inner
def test_imports_go_up(module):
    for name in imports(MODULES[module]):
        if not name.startswith("palettax"):
            continue
        assert name != "palettax" or family(module) in EDGE, f"{module} imports the front door"
        if name != "palettax" and family(name) != family(module):
            assert LEVEL[family(name)] < LEVEL[family(module)], f"{module} imports {name}, which is not above it"


@inner
def test_extras_are_imported_by_adapters_and_the_edge_only(module):
    found = {name.split(".")[0] for path in [MODULES[module]] for name in (*imports(path), *required(path))}
    if LEVEL[family(module)] < LEVEL["torch"]:
        assert not found & (OPTIONAL - {"rich"} if module == "palettax._progress" else OPTIONAL)
    # The one function for those who call coremltools themselves imports it when it is called.
    if family(module) == "torch" and module != "palettax.torch.conversion":
        assert "coremltools" not in found


def test_the_package_itself_is_the_core_only():
    found = {family(name) for name in imports(MODULES["palettax"])}
    assert found
    assert not found & {"torch", "coreml", *EDGE}


PULLED_IN = """
import sys, palettax
heavy = {"torch", "coremltools", "flax", "matplotlib", "sklearn", "pandas", "rich", "typer", "safetensors.torch"}
print(sorted(heavy & set(sys.modules)))
"""


def test_importing_palettax_loads_no_extra():
    run = subprocess.run([sys.executable, "-c", PULLED_IN], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "[]"


LATER = """
import sys, palettax
assert "palettax.plot" not in sys.modules
print(palettax.plot is sys.modules["palettax.plot"], hasattr(palettax, "plots"))
"""


def test_heavy_parts_are_imported_at_first_use():
    run = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == "True False"


def test_modules_are_small():
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert not {module: n for module, n in lines.items() if n > 500}
    assert statistics.median(n for m, n in lines.items() if not MODULES[m].name.startswith("__")) < 200


def public(path):
    """Names of the public classes, functions and methods that a module defines, read without importing it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                        yield f"{node.name}.{item.name}"


PUBLIC = [(module, name) for module, path in MODULES.items() for name in public(path)]
FRONT = sorted(
    n for n, o in vars(px).items() if not n.startswith("_") and (inspect.isfunction(o) or inspect.isclass(o))
)


def find(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    return found


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{m}.{n}" for m, n in PUBLIC])
def test_docstring(module, name):
    found = find(module, name)
    documentation = inspect.getdoc(found)
    assert documentation, "a public name without a docstring"
    examples = doctest.DocTestParser().get_doctest(documentation, dict(vars(sys.modules[module])), name, module, 0)
    said = []
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(examples, out=said.append)
    assert not result.failed, "".join(said)


@pytest.mark.parametrize("name", FRONT)
def test_the_front_door_is_documented_by_example(name):
    found = getattr(px, name)
    assert inspect.getdoc(found)
    if inspect.isfunction(found):
        assert "Example:" in found.__doc__
        assert ">>>" in found.__doc__


def test_every_module_says_what_it_is():
    assert not [m for m, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))]
