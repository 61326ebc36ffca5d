"""`evomerge path` as it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from evomerge.cli.path import show, terminal
from evomerge.report.path_map import path_of_run
from evomerge.report.path_text import path_text
from tests.cli.conftest import Command
from tests.report.runs import genome, make_run, trial
from tests.report.test_path_files import piece, recipe_file


@pytest.fixture
def run_dir(tmp_path: Path, tiny_zoo: Path) -> Path:
    trials = [trial(0, genome("one.1", "two.1"), fitness=0.75), trial(1, genome("two.3"), asked_after=1)]
    return make_run(tmp_path / "run", tiny_zoo, trials)


def test_a_run_is_drawn_on_stdout(command: Command, run_dir: Path) -> None:
    best, other = command("path", "run"), command("path", "run", "--trial", 1)
    assert (best.code, best.err) == (0, "")
    assert (
        best.out.splitlines()[0]
        == "trial 0 of run, fitness 0.7500 (standard error 0.0500) on the search documents"
    )
    assert best.out.splitlines()[-1] == "path: A 0-1, B 1, A 3"
    assert other.out.splitlines()[-1] == "path: A 0, B 3, A 3"
    assert best.out.isascii()


def test_a_population_is_drawn_with_its_picture(command: Command, run_dir: Path, tmp_path: Path) -> None:
    result = command("path", "run", "--population", "--png", "population.png")
    assert result.code == 0
    assert "share of the candidates that keep a layer, by generation" in result.out
    assert result.err == "note: wrote population.png\n"
    assert (tmp_path / "population.png").read_bytes().startswith(b"\x89PNG")


def test_a_recipe_is_drawn_with_its_picture(command: Command, tmp_path: Path) -> None:
    recipe_file(tmp_path, slices=[piece("a", 0, 8, scale=[{"filter": "down_proj", "value": 0.8}])])
    result = command("path", "recipe.yml", "--png", "path.png")
    assert result.out.splitlines()[-1] == "path: A 0-7 x0.8"
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["recipe.yml", "--trial", "1"], "--trial is for run directories; recipe.yml is none"),
        (["recipe.yml", "--population"], "--population is for run directories"),
        (["recipe.yml", "--png", "path.jpg"], "expected a file that ends in .png, got path.jpg"),
        (["recipe.yml", "--recipe", "new.yml"], "--recipe is for checkpoints"),
        (["run", "--recipe", "new.yml"], "`evomerge export` writes the recipes of runs"),
        (["run", "--trial", "1", "--population"], "--trial and --population exclude each other"),
        (["run", "--trial", "5"], "no trial 5 is recorded"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    command: Command, run_dir: Path, tmp_path: Path, options: list[str], reason: str
) -> None:
    recipe_file(tmp_path, slices=[piece("a", 0, 8)])
    result = command("path", *options)
    assert result.code == 2
    assert reason in " ".join(result.err.split())
    assert result.out == ""


def test_a_recipe_overwrites_nothing(command: Command, tmp_path: Path, tiny_zoo: Path) -> None:
    (tmp_path / "thesis.yml").write_text("precious")
    assert command("path", tiny_zoo / "one", "--recipe", "thesis.yml").code == 3
    assert (tmp_path / "thesis.yml").read_text() == "precious"


@pytest.mark.parametrize(
    ("variables", "plain"),
    [({"FORCE_COLOR": "1"}, False), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True), ({}, True)],
)
def test_colour_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run_dir: Path,
    variables: dict[str, str],
    plain: bool,
) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **variables}.items():
        monkeypatch.setenv(name, value)
    width, found = terminal()
    assert (width, found) == (80, plain)
    show(path_text(path_of_run(run_dir, 0), width=width, plain=found), plain=found)
    assert ("\x1b[" in capsys.readouterr().out) is not plain


def test_matplotlib_is_loaded_only_for_pictures_and_pyplot_never(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, slices=[piece("a", 0, 8)])
    script = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from evomerge.cli.path import path\n"
        "def loaded(*options): \n"
        f"    assert CliRunner().invoke(path, [{str(file)!r}, *options]).exit_code == 0\n"
        "    return {'matplotlib', 'matplotlib.pyplot', 'torch'} & set(sys.modules)\n"
        "assert not loaded()\n"
        f"assert loaded('--png', {str(tmp_path / 'path.png')!r}) == {{'matplotlib'}}\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
