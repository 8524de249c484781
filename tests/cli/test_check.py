"""`longwave check`: exit codes, the certificate, and errors that name the argument."""

import subprocess
import sys

import pytest

from longwave.cli.check import find
from longwave.cli.main import SUBCOMMANDS, main
from longwave.cli.usage import UsageError, assignments, nearest

TOY = "tests.layers.toy_mixers"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in SUBCOMMANDS:
        assert f"    {name}" in text
    assert "Examine a mixer by the mixer contract" in text


def test_help_of_a_command_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    assert "longwave check longwave.layers:S4D --set N=16" in capsys.readouterr().out


def test_help_needs_no_jax():
    code = "import sys; from longwave.cli.main import build_parser; build_parser(); print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_a_good_mixer_gets_its_certificate_and_zero(capsys):
    assert main(["check", f"{TOY}:Smoother", "--width", "8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{TOY}:Smoother (width=8), short form")
    assert "12 kept, 0 broken, 6 skipped" in text


def test_a_bad_mixer_gets_one_and_the_reason(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_own.py").write_text(
        f"from {TOY} import Smoother\nclass Mine(Smoother):\n"
        "    def __init__(self, width, *, gain=1, rngs):\n        super().__init__(width, rngs=rngs)\n"
        "    roles = {}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["check", "my_own:Mine", "--set", "gain=3"]) == 1
    text = capsys.readouterr().out
    assert text.startswith("my_own:Mine (width=16, gain=3), short form")
    assert "✗ roles" in text
    assert "parameter C of Mine has role None" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["tests.layers.toy_mixers"],
            "PACKAGE:MIXER 'tests.layers.toy_mixers': expected module:Name",
        ),
        (["no_such_package:Mixer"], "PACKAGE:MIXER 'no_such_package:Mixer': no module 'no_such_package'"),
        ([f"{TOY}:Leakly"], f"{TOY} has no 'Leakly'; did you mean 'Leaky'?"),
        ([f"{TOY}:Leaky", "--set", "N"], "--set 'N': expected NAME=VALUE"),
        ([f"{TOY}:Leaky", "--set", "N=8"], "--set N: there is none to set"),
        ([f"{TOY}:Leaky", "--width", "0"], "--width 0"),
    ],
)
def test_wrong_arguments_are_named(argv, message, capsys):
    assert main(["check", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("longwave check: ")
    assert message in error


def test_assignments_are_literals_or_strings():
    given = assignments(["N=8", "dt_min=1e-3", "method=lin", "sizes=(1, 2)", "tied=True", "at=a=b"], "--set")
    assert given == {"N": 8, "dt_min": 1e-3, "method": "lin", "sizes": (1, 2), "tied": True, "at": "a=b"}
    with pytest.raises(UsageError, match="--set '8=N'"):
        assignments(["8=N"], "--set")


def test_nearest_and_find():
    assert nearest("dt_mim", ["dt_min", "N"]) == "; did you mean 'dt_min'?"
    assert nearest("quite_other", ["N"]) == ""
    assert find(f"{TOY}:Leaky").__name__ == "Leaky"
