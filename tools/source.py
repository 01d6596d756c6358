"""A lesson's source: its exercises as a stub or solved, and what its readers or tools would stumble over."""

import ast
import re

import jupytext
import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from tools.course import ToolError, declared, first_line

HANGING = {"interact", "interact_manual", "interactive", "interactive_output", "Output"}  # nbclient issue 312
NEEDED = {"PROFILE", "SEED", "DEVICE", "OUT"}
# marker: (what stands before it, what stands after it)
BLOCK = {"# <solution>": ("text", "solution"), "# <stub>": ("solution", "stub"), "# </stub>": ("stub", "text")}


def render(text: str, solved: bool, where: str) -> str:
    """Return a lesson's source with each block resolved to its solution or its uncommented stub; ToolError names a bad line."""
    kept, state, opened = [], "text", 0
    for number, line in enumerate(text.splitlines(), start=1):
        bare = line.strip()
        if bare in BLOCK:
            before, after = BLOCK[bare]
            if state != before:
                raise ToolError(f"{where}, line {number}: '{bare}' is out of place; the order is <solution>, <stub>, </stub>")
            state, opened = after, number
        elif re.match(r"# ?</?(solution|stub)", bare):
            raise ToolError(f"{where}, line {number}: '{bare}' is no marker; write # <solution>, # <stub> or # </stub>")
        elif state != "text" and bare.startswith("# %%"):
            break
        elif state == "text" or (state == "solution" and solved):
            kept.append(line)
        elif state == "stub" and not solved:
            if bare and not bare.startswith("#"):
                raise ToolError(f"{where}, line {number}: a line of a stub must be a comment, found '{bare}'")
            kept.append(re.sub(r"# ?", "", line, count=1).rstrip())
    if state != "text":
        raise ToolError(f"{where}, line {opened}: the block that is opened here is not closed before its cell ends")
    return "\n".join(kept) + "\n"


def lint(text: str, where: str) -> list[str]:
    """Return what is wrong with a lesson's source, one line each: what hangs, parameters, exercises, alt text."""
    found = []
    cells = jupytext.reads(text, fmt="py:percent").cells
    tags = [tag for cell in cells for tag in cell.metadata.get("tags", [])]
    for number, cell in enumerate(cells, start=1):
        place = f"{where}, cell {number} ({first_line(cell.source)!r})"
        if cell.cell_type == "markdown":
            if re.search(r"!\[\s*\]\(|<img(?![^>]*\balt=\"[^\"])", cell.source):
                found.append(f"{place}: a picture has no alt text")
            if re.search(r"^# ", cell.source, re.MULTILINE):
                found.append(f"{place}: the title comes from course.toml; start headings at '##'")
            continue
        try:
            tree = ast.parse(TransformerManager().transform_cell(cell.source))
        except SyntaxError as error:
            found.append(f"{place}: line {error.lineno} is no Python: {error.msg}")
            continue
        names = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(tree)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        found += [
            f"{place}: {name} hangs when executed; use controls, widgets.Image and observe"
            for name in sorted(names & HANGING, key=str)
        ]
        for tag in cell.metadata.get("tags", []):
            id = tag.removeprefix("exercise-")
            if id == tag:
                continue
            later = [c for c in cells[number:] if f"check-{id}" in c.metadata.get("tags", [])]
            if tags.count(tag) != 1 or len(later) != 1 or f'check("{id}"' not in later[0].source:
                found.append(f'{place}: exercise {id} needs one later cell tagged check-{id} that calls check("{id}", ...)')
            if "# <solution>" not in cell.source:
                found.append(f"{place}: exercise {id} has no '# <solution>' block")
    try:
        known = declared(nbformat.v4.new_notebook(cells=cells), where)
        found += [f"{where}: the parameters cell does not declare {name}" for name in sorted(NEEDED - set(known))]
        found += [
            f"{where}: parameter {name} has no comment"
            for name, parameter in known.items()
            if not parameter.help and not parameter.choices
        ]
    except ToolError as error:
        found.append(str(error))
    return found
