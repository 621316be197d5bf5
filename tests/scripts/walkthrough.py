"""Run the code blocks of docs/walkthrough.md in order, on a run; write again what each prints, and the page's pictures.

    python tests/scripts/walkthrough.py docs/walkthrough.md data/toy out/toy
"""
import contextlib
import io
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from wsss.stage import read_text, write  # noqa: E402, found by the line above


def rewrite(page, root, out):
    """page: the Markdown file, its pictures in the folder of its name; root: data set; out: folder of the run"""
    names = {}
    page.with_suffix("").mkdir(parents=True, exist_ok=True)

    def run(block):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block[1], str(page), "exec"), names)
        names.update(DATA=root, OUT=out, PICTURES=page.with_suffix(""))  # in place of those of the first block
        printed = printed.getvalue()
        return f"```python\n{block[1]}```\n" + (f"```text\n{printed}```\n" if printed else "")

    text = re.sub(r"```python\n(.*?)```\n(```text\n.*?```\n)?", run, read_text(page), flags=re.DOTALL)
    write(page, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    rewrite(*map(Path, sys.argv[1:]))
