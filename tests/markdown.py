"""What a page of Markdown says is printed, and what is."""

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"^```(python|sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line that it begins in."""

    language: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in BLOCK.finditer(text)]


def run_blocks(page: Path) -> None:
    """Run the Python of a page in one namespace, and commands whose output is shown; compare what they print."""
    blocks, namespace, printed = blocks_of(page), {}, None
    for block, after in zip(blocks, [*blocks[1:], None], strict=False):
        if block.language == "text":
            assert printed is not None, f"{page.name}:{block.line} follows nothing that prints"
            assert printed == block.text, f"{page.name}:{block.line}"
            printed = None
        elif block.language == "python":
            printed = _of_python(page, block, namespace)
        elif after is not None and after.language == "text":
            printed = _of_commands(page, block)


def _of_python(page, block, namespace):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
    return output.getvalue()


def _of_commands(page, block):
    """What lines that begin with `palettax` print, on a terminal of 100 columns."""
    from typer.testing import CliRunner

    from palettax._commands import app

    output = ""
    for line in block.text.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "palettax", f"{page.name}:{block.line}: {line}"
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
        assert result.exit_code == 0, f"{page.name}:{block.line}: {line}: {result.output}"
        output += "".join(line.rstrip() + "\n" for line in result.stdout.splitlines())
    return output
