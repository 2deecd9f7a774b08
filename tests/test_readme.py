"""Every Python block of the README runs, and prints what the text block after it says."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(python|text)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_blocks_run_and_print_what_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    printed = io.StringIO()
    for language, block in BLOCKS:
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(block, "README.md", "exec"), namespace)
        else:
            assert printed.getvalue() == block
    assert [language for language, _ in BLOCKS].count("text") == [language for language, _ in BLOCKS].count("python")


def test_code_comes_first():
    lines = README.read_text().splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("```python")) < 15
