"""What the docstrings say, as the site's parser wants to read it."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Reads `Example:` as a section of examples, and the asterisk of a shape such as (*shape) as a character."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the text of one docstring before it is parsed."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            # Not in a call, nor in code between backticks.
            obj.docstring.value = re.sub(r"(?<![\w`]\()(?<=\()\*(?=[a-z])", r"\\*", text)
