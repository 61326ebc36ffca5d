"""A model's name leads to a folder, or to an error that says where was looked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.reference import ModelReference, absolute, resolve
from evomerge.errors import CheckpointError
from tests import oracle
from tests.adapters import make_adapter
from tests.tiny import make_model

from .files import model, sharded, tensors

words = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="./-_~"), min_size=1)


def ref(text: str) -> ModelReference:
    return ModelReference.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", ModelReference("owner/name")),
        ("./models/a", ModelReference("./models/a")),
        ("owner/name@main", ModelReference("owner/name", "main")),
        ("owner/name+owner/lora", ModelReference("owner/name", None, "owner/lora")),
        ("owner/name@refs/pr/1+lora", ModelReference("owner/name", "refs/pr/1", "lora")),
        ("owner/name+owner/lora@v2", ModelReference("owner/name", None, "owner/lora", "v2")),
        ("owner/name@v1+owner/lora@v2", ModelReference("owner/name", "v1", "owner/lora", "v2")),
    ],
)
def test_the_text_form_is_read_and_written(text: str, expected: ModelReference) -> None:
    assert ref(text) == expected
    assert str(expected) == text


@given(words, st.none() | words, st.none() | words, st.none() | words)
def test_every_reference_comes_back_from_its_text(
    model: str, revision: str | None, adapter: str | None, adapter_revision: str | None
) -> None:
    reference = ModelReference(model, revision, adapter, adapter_revision if adapter else None)
    assert ref(str(reference)) == reference


@pytest.mark.parametrize("text", ["a", "a@b", "a+c", "a@b+c", "a+c@d", "a@b+c@d"])
def test_the_text_is_mergekits(text: str) -> None:
    theirs, ours = oracle.ModelReference.parse(text), ref(text)
    assert (theirs.model.path, theirs.model.revision) == (ours.model, ours.revision)
    lora = theirs.lora
    assert (lora and lora.path, lora and lora.revision) == (ours.adapter, ours.adapter_revision)
    assert str(theirs) == str(ours)


@pytest.mark.parametrize(
    "text",
    ["", "@main", "a@", "a+", "+lora", "a@b@c", "a+b@c@d", "a+b+c", "a+b@", "a+@b", " a", "a\n", "a\0"],
)
def test_any_other_text_is_refused_with_the_form_expected(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"expected path-or-id\[@revision\]\[\+adapter\[@revision\]\].*found"
    ):
        ref(text)


def test_a_reference_that_its_text_could_not_express_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="cannot hold '@' or '\\+'"):
        ModelReference("a@b")
    with pytest.raises(ValueError, match="expected an adapter to have revision 'v1', found none"):
        ModelReference("a", adapter_revision="v1")


def test_references_are_ordered_with_and_without_a_revision() -> None:
    texts = ["b", "a@main", "a+lora", "a"]
    assert [str(reference) for reference in sorted(map(ref, texts))] == sorted(texts)
    assert ref("a") <= ref("a") < ref("a@main")


# Local folders.


def test_a_folder_is_found_as_given_and_relative_to_the_roots_before_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("cwd/x", "one/x", "two/x", "two/owner/name", "cwd/y"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    roots = [tmp_path / "one", tmp_path / "two"]
    assert resolve(ref("x")) == tmp_path / "cwd" / "x"
    assert resolve(ref("./x"), roots) == tmp_path / "one" / "x"
    assert resolve(ref("x"), roots[::-1]) == tmp_path / "two" / "x"
    assert resolve(ref("y"), roots) == tmp_path / "cwd" / "y"
    assert resolve(ref(str(tmp_path / "two" / "x")), roots) == tmp_path / "two" / "x"


def test_a_folder_wins_over_the_hub(tmp_path: Path, hub: Any) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve(ref("owner/name"), [tmp_path]) == tmp_path / "owner" / "name"
    assert hub.calls == []


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(ref("~/models")) == tmp_path / "models"
    with pytest.raises(CheckpointError, match="~nobody-by-this-name/x"):
        resolve(ref("~nobody-by-this-name/x"))


@pytest.mark.parametrize(
    "text", ["./math", "../x/math", "/nowhere/math", "~/nowhere/math", "math", "a/b/c", "a b/c"]
)
def test_what_cannot_be_a_hub_id_must_be_a_folder(
    text: str, tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no such folder.*looked for") as caught:
        resolve(ref(text), [tmp_path])
    assert str(caught.value).startswith(text)
    assert hub.calls == []


def test_the_folder_spelt_most_alike_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "math_en").mkdir()
    with pytest.raises(CheckpointError, match="did you mean 'math_en'"):
        resolve(ref("./math-en"), [tmp_path])


def test_a_file_and_a_revision_of_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"is a file; name the folder that holds config\.json"):
        resolve(ref("./file"), [tmp_path])
    with pytest.raises(CheckpointError, match="is a local folder; remove '@main'"):
        resolve(ref("folder@main"), [tmp_path])


# Adapters.


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in `models/base` and an adapter of it in `loras/one`."""
    folder = tmp_path_factory.mktemp("zoo")
    base = make_model(folder / "models" / "base", seed=0, num_hidden_layers=1)
    make_adapter(folder / "loras" / "one", base, target_modules=["q_proj"])
    return folder


def test_a_model_with_an_adapter_is_the_folder_of_both_merged(zoo: Path, tmp_path: Path, cache: Path) -> None:
    folder = resolve(ref("models/base+./loras/one"), [tmp_path, zoo])
    assert folder.parent == cache / "adapters"
    assert resolve(ref(f"{zoo}/models/base+{zoo}/loras/one")) == folder
    merged, base = Checkpoint.open(folder), Checkpoint.open(zoo / "models" / "base")
    differ = [name for name in base.tensors if not base.tensor(name).equal(merged.tensor(name))]
    assert differ == ["model.layers.0.self_attn.q_proj.weight"]


def test_an_adapter_that_is_missing_or_none_is_named(zoo: Path, hub: Any) -> None:
    with pytest.raises(CheckpointError, match=r"base\+\./loras/on: no such folder \(did you mean 'one'\?\)"):
        resolve(ref("models/base+./loras/on"), [zoo])
    with pytest.raises(CheckpointError, match=r"is a file; name the folder that holds adapter_config\.json"):
        resolve(ref("models/base+./loras/one/adapter_model.safetensors"), [zoo])
    with pytest.raises(CheckpointError, match="loras/one is a local folder; remove '@v1'"):
        resolve(ref("models/base+loras/one@v1"), [zoo])
    with pytest.raises(CheckpointError, match="so this is a full model; name the folder of a PEFT adapter"):
        resolve(ref("models/base+models/base"), [zoo])
    with pytest.raises(CheckpointError, match=r"is an adapter; name it behind .* as in model\+loras/one"):
        resolve(ref("loras/one"), [zoo])
    assert hub.calls == []


def test_local_folders_get_absolute_names_that_mean_the_same(zoo: Path, hub: Any, cache: Path) -> None:
    base, lora = f"{zoo}/models/base", f"{zoo}/loras/one"
    for text, expected in {
        "models/base": base,
        "models/base+loras/one": f"{base}+{lora}",
        "models/base+owner/lora@v1": f"{base}+owner/lora@v1",
        "owner/name@v1+loras/one": f"owner/name@v1+{lora}",
        "owner/name@v1": "owner/name@v1",
    }.items():
        assert str(absolute(ref(text), [zoo])) == expected
        assert absolute(absolute(ref(text), [zoo])) == absolute(ref(text), [zoo])
    assert hub.calls == []


@pytest.mark.parametrize("name", ["a+b", "a@b"])
def test_a_folder_whose_absolute_path_cannot_be_named_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "model").mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"cannot hold '@' or '\+'.*make a link to it with another name"
    ):
        absolute(ref("model"), [tmp_path / name])


# The hub.


class Hub:
    """Stands in for the download: `cached` and `online` are folders, or errors to raise."""

    def __init__(self) -> None:
        self.cached: Path | Exception = FileNotFoundError("not cached")
        self.online: Path | Exception = OSError("401 Client Error: gated\nsecond line")
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        answer = self.cached if options["local_files_only"] else self.online
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def with_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_cached_model_is_used_without_asking_the_hub(tmp_path: Path, hub: Hub) -> None:
    hub.cached = with_tokenizer(model(tmp_path / "snapshot"))
    assert resolve(ref("owner/name@v1")) == hub.cached
    (call,) = hub.calls
    assert (call["repo_id"], call["revision"], call["local_files_only"]) == ("owner/name", "v1", True)


def test_a_model_that_is_not_cached_is_downloaded(tmp_path: Path, hub: Hub) -> None:
    hub.online = model(tmp_path / "snapshot")
    assert resolve(ref("owner/name")) == hub.online


def test_a_cache_that_holds_only_a_part_of_the_model_is_completed(tmp_path: Path, hub: Hub) -> None:
    hub.online = with_tokenizer(model(tmp_path / "complete"))
    partial = sharded(tmp_path / "partial", {"a.safetensors": tensors(1), "b.safetensors": {}})
    (partial / "a.safetensors").unlink()
    no_weights = tmp_path / "no_weights"
    no_weights.mkdir()
    for folder in (partial, no_weights, model(tmp_path / "no_tokenizer")):
        hub.cached = folder
        assert resolve(ref("owner/name")) == hub.online


def test_a_cached_model_without_tokenizer_will_do_when_the_hub_cannot_be_reached(
    tmp_path: Path, hub: Hub
) -> None:
    hub.cached = model(tmp_path / "snapshot")
    assert resolve(ref("owner/name")) == hub.cached


def test_a_failed_download_says_what_was_tried_and_why_it_failed(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "owner" / "names").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        resolve(ref("owner/name@v1"), [tmp_path])
    message = str(caught.value)
    assert message.startswith("owner/name@v1: not a folder here (looked for ")
    assert "did you mean 'names'" in message
    assert "not in the hub cache" in message
    assert "the download failed: 401 Client Error: gated; check the path, or log in" in message
    assert "second line" not in message


def test_only_what_a_model_needs_is_downloaded(hub: Hub) -> None:
    from huggingface_hub.utils import filter_repo_objects

    with pytest.raises(CheckpointError):
        resolve(ref("owner/name"))
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
        "merges.txt",
    ]
    unwanted = [
        "pytorch_model.bin",
        "original/params.json",
        "consolidated.safetensors",
        "README.md",
        "x.gguf",
        "code.py",
    ]
    for call in hub.calls:
        patterns = {key: call[key] for key in ("allow_patterns", "ignore_patterns")}
        assert list(filter_repo_objects(wanted + unwanted, **patterns)) == wanted


def test_a_model_in_a_real_hub_cache_is_found_and_opened_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, commit = tmp_path / "models--owner--name", "0" * 40
    snapshot = with_tokenizer(model(repo / "snapshots" / commit))
    (repo / "blobs").mkdir()
    for file in snapshot.iterdir():
        blob = repo / "blobs" / file.name.encode().hex()
        file.rename(blob)
        file.symlink_to(Path("..", "..", "blobs", blob.name))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve(ref("owner/name")) == snapshot
    assert list(Checkpoint.open(resolve(ref(f"owner/name@{commit}"))).tensors) == sorted(tensors())
    assert json.loads((snapshot / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(CheckpointError, match="not in the hub cache, and the download failed"):
        resolve(ref("owner/other"))


def test_an_adapter_of_the_hub_is_downloaded_at_its_revision_without_other_weights(
    zoo: Path, hub: Hub
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    hub.online = zoo / "loras" / "one"
    merged = resolve(ref("models/base+owner/lora@v1"), [zoo])
    assert merged == resolve(ref("models/base+loras/one"), [zoo])
    wanted = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"]
    unwanted = [
        "model-00001-of-00002.safetensors",
        "adapter_model.bin",
        "checkpoint-10/adapter_model.safetensors",
    ]
    assert [call["local_files_only"] for call in hub.calls] == [True, False]
    for call in hub.calls:
        assert (call["repo_id"], call["revision"]) == ("owner/lora", "v1")
        patterns = {key: call[key] for key in ("allow_patterns", "ignore_patterns")}
        assert list(filter_repo_objects(wanted + unwanted, **patterns)) == wanted


def test_a_cached_adapter_is_used_when_the_hub_cannot_be_reached_and_half_of_one_is_not(
    zoo: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.cached = zoo / "loras" / "one"
    assert resolve(ref("models/base+owner/lora"), [zoo]) == resolve(ref("models/base+loras/one"), [zoo])
    hub.cached = tmp_path
    shutil.copy(zoo / "loras" / "one" / "adapter_config.json", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"\+owner/lora: owner/lora: not a folder here.*download failed"
    ):
        resolve(ref("models/base+owner/lora"), [zoo])
