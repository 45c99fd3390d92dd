"""Files are whole or not there, whatever happens while they are written."""

import os

import pytest

from million_experts.lm import files
from million_experts.lm.files import save_whole, write_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, "old")

    def no_space(handle):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    monkeypatch.undo()
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_a_folders_files_arrive_whole_beside_those_that_stand_there(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "other").write_text("stays")

    def save(folder):
        for name in "ab":
            with open(os.path.join(folder, name), "w") as file:
                file.write("new")

    def die(folder):
        save(folder)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_whole(die, tmp_path)
    assert (tmp_path / "a").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a", "other"], "half of it takes room"
    save_whole(save, tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new", "b": "new", "other": "stays"}
