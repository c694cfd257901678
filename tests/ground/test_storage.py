"""Whatever happens in the middle of writing, the old state or the new one is there, never half of it."""

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from genailab_helpers.storage import cache_folder, whole_file, whole_folder


def test_a_file_appears_whole_with_usual_permissions(tmp_path):
    target = tmp_path / "new" / "weights.bin"
    with whole_file(target) as temporary:
        temporary.write_bytes(b"half")
        assert not target.exists()
        assert temporary.parent == target.parent
        assert temporary.suffix == ".bin"
    plain = tmp_path / "plain"
    plain.touch()
    assert target.read_bytes() == b"half"
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert os.listdir(target.parent) == ["weights.bin"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(errno.EIO, "no cable")])
def test_an_exception_leaves_the_old_file_and_passes_through(tmp_path, error):
    target = tmp_path / "recipe.json"
    target.write_text("old")

    def write_half() -> None:
        with whole_file(target) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(type(error)) as caught:
        write_half()
    assert caught.value is error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["recipe.json"]


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "run"
    target.mkdir()  # an empty one is welcome
    with whole_folder(target) as temporary:
        (temporary / "a").write_text("1")
        assert list(target.iterdir()) == []
    assert (target / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["run"]


def test_a_folder_that_is_not_empty_is_refused_before_work_begins(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for target in (tmp_path / "run", tmp_path / "file"):
        with pytest.raises(FileExistsError, match="expected a new or empty folder"), whole_folder(target):
            pytest.fail("the block must not start")
    assert (tmp_path / "run" / "mine").read_text() == (tmp_path / "file").read_text() == "precious"


def test_a_folder_filled_meanwhile_is_not_mixed_with(tmp_path):
    target = tmp_path / "run"

    def write_while_another_does() -> None:
        with whole_folder(target) as temporary:
            (temporary / "ours").touch()
            target.mkdir()
            (target / "theirs").touch()

    with pytest.raises(OSError, match="run"):
        write_while_another_does()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "theirs"]


def test_an_exception_leaves_no_folder(tmp_path):
    def write_half() -> None:
        with whole_folder(tmp_path / "run") as temporary:
            (temporary / "a").touch()
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_half()
    assert os.listdir(tmp_path) == []


def _run(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(folder)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


KILLED = {
    "file": """
        import sys, time, pathlib
        from genailab_helpers.storage import whole_file
        with whole_file(pathlib.Path(sys.argv[1]) / "target") as temporary, temporary.open("wb") as file:
            file.write(b"new" * 10000); file.flush()
            print("half", flush=True)
            time.sleep(60)
    """,
    "folder": """
        import sys, time, pathlib
        from genailab_helpers.storage import whole_folder
        with whole_folder(pathlib.Path(sys.argv[1]) / "target") as temporary:
            (temporary / "one").write_text("new")
            print("half", flush=True)
            time.sleep(60)
    """,
}


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL exists on POSIX only")
@pytest.mark.parametrize("kind", list(KILLED))
def test_a_kill_in_the_middle_leaves_the_old_state_and_does_not_hinder_the_next_run(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("old")
    process = _run(KILLED[kind], tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if kind == "file":
        assert target.read_text() == "old"
        with whole_file(target) as temporary:
            temporary.write_text("new")
        assert target.read_text() == "new"
    else:
        assert not target.exists()
        with whole_folder(target) as temporary:
            (temporary / "two").touch()
        assert os.listdir(target) == ["two"]


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE exists on POSIX only")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_disk_without_room_is_one_clear_error_and_changes_nothing(tmp_path, kind):
    code = f"""
        import resource, signal, sys, pathlib
        from genailab_helpers.storage import whole_file, whole_folder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with whole_{kind}(pathlib.Path(sys.argv[1]) / "target") as temporary:
                file = temporary if "{kind}" == "file" else temporary / "inside"
                file.write_bytes(b"new" * 10000)
        except OSError as error:
            print(error)
    """
    if kind == "file":
        (tmp_path / "target").write_text("old")
    said, errors = _run(code, tmp_path).communicate()
    assert errors == ""
    assert "no room to write, nothing was changed" in said
    assert str(tmp_path / "target") in said
    assert len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == (["target"] if kind == "file" else [])
    if kind == "file":
        assert (tmp_path / "target").read_text() == "old"


def test_readers_never_see_half_a_file(tmp_path):
    """While one process replaces a file again and again, every read finds one version of it, whole."""
    code = """
        import sys, pathlib
        from genailab_helpers.storage import whole_file
        target = pathlib.Path(sys.argv[1]) / "target"
        for version in range(200):
            with whole_file(target) as temporary:
                temporary.write_bytes(bytes([version]) * 100_000)
            if version == 0:
                print("go", flush=True)
    """
    process = _run(code, tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    seen = set()
    while process.poll() is None:
        content = np.frombuffer((tmp_path / "target").read_bytes(), dtype=np.uint8)
        assert content.size == 100_000
        assert content.min() == content.max()
        seen.add(int(content[0]))
        time.sleep(0.001)
    process.communicate()
    assert len(seen) > 1


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path / "a" / "b"))
    assert cache_folder() == tmp_path / "a" / "b"
    assert cache_folder().is_dir()
    monkeypatch.delenv("GENAILAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "genailab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "genailab"
