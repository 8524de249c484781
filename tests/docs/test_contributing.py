"""The mixer that CONTRIBUTING.md shows keeps the contract that it claims."""

import re
import textwrap
from pathlib import Path

from longwave.layers import contract

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_the_mixer_of_the_page_passes_the_contract():
    (code,) = re.findall(
        r"((?:^(?:    .*)?\n)*^    class \w+\(Mixer\):\n(?:^(?:    .*)?\n)*)", PAGE.read_text(), re.MULTILINE
    )
    names = {"__name__": "contributing"}
    exec(textwrap.dedent(code), names)
    broken = [check for check in contract.examine(names["Decay"]) if not check.passed and not check.skipped]
    assert broken == []
