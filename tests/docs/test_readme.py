"""The README's Python block runs, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_example_streams():
    block = re.search(r"```python\n(import .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(block, names)
    assert names["y"].shape == (8, 1, 64)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), f"{page} links {target}"
