"""Files that appear whole or not at all, and text files whose errors name them."""

import gzip
import json
import math
import os
import stat
import tempfile
import threading

import pytest

from prefix_tuning.files import check_writable, open_text, replacing, write_json, write_json_lines


def test_the_block_writes_beside_the_file_which_stands_until_the_end(tmp_path):
    path = tmp_path / "new" / "folder" / "file.json"
    for content in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with replacing(str(path)) as temporary:
            temporary.write_text(content)
            assert temporary != path and (temporary.parent, temporary.suffix) == (path.parent, ".json")
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == content and list(path.parent.iterdir()) == [path]


def test_check_writable(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "folder"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        check_writable(tmp_path / "file")
    # Who runs as root may write anywhere.
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: (dir / "none" / "file").write_text(""))
    with pytest.raises(OSError, match="none"):
        check_writable(tmp_path)


@pytest.mark.parametrize("old", (None, "old"))
@pytest.mark.parametrize("fails", ("block", "replace"))
def test_after_an_error_the_old_file_stands_and_nothing_else(fails, old, tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    if old:
        path.write_text(old)

    def fail(*_):
        raise OSError("no space left")

    if fails == "replace":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"), replacing(path) as temporary:
        temporary.write_text("half")
        if fails == "block":
            fail()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({"file.txt": "old"} if old else {})


def test_a_block_may_remove_its_file_only_at_the_price_of_an_error(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path) as temporary:
        temporary.unlink()
    assert path.read_text() == "old"


@pytest.mark.parametrize("umask, mode", ((0o022, 0o644), (0o077, 0o600)))
def test_files_have_the_mode_that_the_umask_gives(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "file.json", {})
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.json").stat().st_mode) == mode


def test_json_and_json_lines(tmp_path):
    value = {"name": "Café £20", "losses": [1.5, 2]}
    write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_json_lines(tmp_path / "a.jsonl", [value, {}, "line\nbreak"])
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [value, {}, "line\nbreak"] and lines[-1] == ""
    assert "Café" in lines[0]
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {1j})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


def test_numbers_without_words_in_json_are_null(tmp_path):
    write_json(tmp_path / "a.json", {"loss": math.nan, "losses": [1.0, math.inf], "pair": (-math.inf,)})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "loss": None, "losses": [1.0, None], "pair": [None]
    }  # fmt: skip


@pytest.mark.parametrize("write", (write_json, write_json_lines))
def test_a_name_that_ends_in_gz_is_zipped(write, tmp_path):
    write(tmp_path / "a.json.gz", ["Café"])
    with open_text(tmp_path / "a.json.gz") as file:
        assert json.loads(file.read()) in ("Café", ["Café"])


def test_what_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "real.json")
    for value in (1, 2):
        write_json(tmp_path / "link.json", value)
        assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "there" / "real.json").read_text()) == value


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_json_lines(tmp_path / "pipe", ["a", "b"])
    reader.join(10)
    assert read == ['"a"\n"b"\n'] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_pipe_without_a_name_is_written_to():
    """As a shell's >(command), by the link that leads to it."""
    read, write = os.pipe()
    write_json_lines(f"/dev/fd/{write}", ["a"])
    os.close(write)
    with os.fdopen(read) as file:
        assert file.read() == '"a"\n'


def test_half_a_surrogate_is_written_as_json_has_it(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", [{"name": "\ud83d"}])
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8")) == {"name": "\ud83d"}


@pytest.mark.parametrize("name", ("a.txt", "a.gz", "a.GZ"))
def test_open_text(name, tmp_path):
    content = "\ufeffCafé\r\nline\u2028two\n".encode()
    (tmp_path / name).write_bytes(content if name == "a.txt" else gzip.compress(content))
    with open_text(tmp_path / name) as file:
        assert list(file) == ["Café\r\n", "line\u2028two\n"]


def test_open_text_names_the_file_and_leaves_other_errors_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path}: not a UTF-8 text file: "), open_text(path) as file:
        file.read()
    with pytest.raises(KeyError, match="inside"), open_text(path):
        raise KeyError("inside")
