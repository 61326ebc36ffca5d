"""Functions are found and hashed without being run, and loaded only as they were hashed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from evomerge.errors import ConfigurationError, FitnessError
from evomerge.fitness.user_code import check_arguments, load_function, module_file, sources, survey

TRAP = "raise SystemExit('this must not run')\n"


def write(folder: Path, **files: str) -> Path:
    """Write `a.py` for `a=text`; `a_in_b=text` goes to `b/a.py`, `init_in_b=text` to `b/__init__.py`."""
    for name, text in files.items():
        module, _, package = name.partition("_in_")
        file = folder / package / f"{'__init__' if module == 'init' else module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_a_function_is_found_and_hashed_without_running_it(tmp_path: Path) -> None:
    write(tmp_path, own_score=TRAP + "def f(documents, generations):\n    return []\n")
    first = survey(["own_score:f"], tmp_path).hashes
    assert list(first) == ["own_score.py"]
    assert module_file("own_score:f", tmp_path) == tmp_path / "own_score.py"
    write(tmp_path, own_score=TRAP + "def f(documents, generations):\n    return [1]\n")
    assert survey(["own_score:f"], tmp_path).hashes != first
    assert list(tmp_path.iterdir()) == [tmp_path / "own_score.py"]


def test_what_a_module_imports_from_beside_it_is_hashed_too(tmp_path: Path) -> None:
    write(
        tmp_path,
        own_score="import json, own_helper\nfrom own_parts import one\ndef f(d, g):\n    import own_late\n",
        own_helper="import own_score\nimport numpy\n",
        own_late="",
        init_in_own_parts="",
        one_in_own_parts="from . import two\nfrom .three import x as y\nfrom ..up import z\n",
        two_in_own_parts="",
        three_in_own_parts="x = 1\n",
        own_unused="",
    )
    assert set(survey(["own_score:f"], tmp_path).hashes) == {
        "own_score.py",
        "own_helper.py",
        "own_late.py",
        "own_parts/__init__.py",
        "own_parts/one.py",
        "own_parts/two.py",
        "own_parts/three.py",
    }


def test_a_module_is_looked_for_in_the_folder_first_then_on_the_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from own_package import extra\nimport numpy\ndef f(d, g):\n    return {}\n"
    installed = write(
        tmp_path / "site",
        init_in_own_package="",
        score_in_own_package=text.format([2]),
        extra_in_own_package="",
        own_other="",
    )
    monkeypatch.syspath_prepend(str(installed))
    folder = write(tmp_path / "folder", another="")
    code = survey(["own_package.score:f"], folder)
    assert set(code.hashes) == {"own_package/__init__.py", "own_package/score.py", "own_package/extra.py"}
    assert load_function("own_package.score:f", code)(None, None) == [2]
    write(folder, init_in_own_package="", score_in_own_package="def f(d, g):\n    return [1]\n")
    code = survey(["own_package.score:f"], folder)
    assert set(code.hashes) == {"own_package/__init__.py", "own_package/score.py"}
    assert load_function("own_package.score:f", code)(None, None) == [1]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("own_scor:f", r"there is no module own_scor in .*did you mean 'own_score'"),
        ("own_score.deeper:f", "there is no module own_score.deeper"),
        ("own_score:brevty", r"own_score\.py has no function 'brevty' \(did you mean 'brevity'\?\)"),
        ("own_broken:f", r"own_broken\.py:2 is not valid Python"),
        ("own_importer:f", r"own_broken\.py:2 is not valid Python"),
        ("time:sleep", "time is not a file of Python code"),
    ],
)
def test_what_is_missing_or_broken_is_named(tmp_path: Path, function: str, reason: str) -> None:
    write(
        tmp_path,
        own_score="def brevity(d, g):\n    return []\n",
        own_broken="x = 1\ndef f(:\n",
        own_importer="import own_broken\ndef f(d, g):\n    return []\n",
    )
    with pytest.raises(ConfigurationError, match=reason):
        survey([function], tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "from own_source import f\n",
        "import own_source\nf = own_source.f\n",
        "class f:\n    pass\n",
        "f: object = print\n",
        "from own_source import *\n",
        "if True:\n    def f(d, g):\n        return []\n",
        "def __getattr__(name):\n    return print\n",
    ],
)
def test_a_function_may_be_defined_in_any_way(tmp_path: Path, text: str) -> None:
    write(tmp_path, own_score=text, own_source="def f(d, g):\n    return []\n")
    assert "own_score.py" in survey(["own_score:f"], tmp_path).hashes


def test_code_that_changed_is_not_loaded(tmp_path: Path) -> None:
    write(
        tmp_path,
        own_score="import own_helper\ndef f(d, g):\n    return own_helper.VALUE\n",
        own_helper="VALUE = 1\n",
    )
    code = survey(["own_score:f"], tmp_path)
    assert load_function("own_score:f", code)(None, None) == 1
    write(tmp_path, own_helper="VALUE = 2\n")
    with pytest.raises(FitnessError, match=r"own_score:f: own_helper\.py changed since the run started"):
        load_function("own_score:f", code)
    assert load_function("own_score:f", survey(["own_score:f"], tmp_path))(None, None) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own_helper.py", "own_score.py"]


def test_experiments_in_different_folders_may_have_functions_of_one_name(tmp_path: Path) -> None:
    found = []
    for number in (1, 2, 1):
        folder = write(
            tmp_path / str(number),
            own_score="from own_helper import VALUE\ndef f(d, g):\n    return VALUE\n",
            own_helper=f"VALUE = {number}\n",
        )
        found.append(load_function("own_score:f", survey(["own_score:f"], folder))(None, None))
    assert found == [1, 2, 1]
    assert not any(str(tmp_path) in entry for entry in sys.path)


def test_a_file_named_like_a_library_replaces_nothing(tmp_path: Path) -> None:
    import random

    write(tmp_path, random="def f(d, g):\n    return []\n")
    with pytest.raises(FitnessError, match="its name, random, is that of a loaded library; rename the file"):
        load_function("random:f", survey(["random:f"], tmp_path))
    assert sys.modules["random"] is random


def test_a_module_that_cannot_be_imported_names_the_line(tmp_path: Path) -> None:
    write(tmp_path, own_score="import own_helper\ndef f(d, g):\n    return []\n", own_helper="x = 1\n1 / 0\n")
    with pytest.raises(
        FitnessError, match=r"own_score:f: cannot be imported: ZeroDivisionError: .* \(own_helper\.py:2\)"
    ):
        load_function("own_score:f", survey(["own_score:f"], tmp_path))
    write(tmp_path, own_score="f = 7\n")
    with pytest.raises(FitnessError, match="expected a function, got int"):
        load_function("own_score:f", survey(["own_score:f"], tmp_path))


def test_a_function_of_other_arguments_is_refused() -> None:
    check_arguments("m:f", lambda documents, generations: [], ["documents", "generations"])
    check_arguments("m:f", lambda *any_number: [], ["documents", "generations"])
    check_arguments("m:f", lambda documents, generations, more=1: [], ["documents", "generations"])
    with pytest.raises(FitnessError, match=r"m:f: expected f\(model, tokenizer, documents\), but too many"):
        check_arguments("m:f", lambda documents, generations: [], ["model", "tokenizer", "documents"])


def test_labels_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, own_score="def f(d, g):\n    return []\n")
    assert (
        survey(["own_score:f"], tmp_path / "one").hashes == survey(["own_score:f"], tmp_path / "two").hashes
    )
    assert list(sources("own_score:f", tmp_path / "one").values()) == [tmp_path / "one" / "own_score.py"]
