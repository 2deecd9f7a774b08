"""Every Python block of the README runs, and prints what the text block after it says."""

from pathlib import Path

from tests.markdown import blocks_of, run_blocks

README = Path(__file__).parent.parent / "README.md"


def test_the_blocks_run_and_print_what_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(README)
    languages = [block.language for block in blocks_of(README)]
    assert languages.count("text") == languages.count("python")


def test_code_comes_first():
    lines = README.read_text().splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("```python")) < 15
