"""Whatever happens in the middle of writing, the old state or the new one is there, never half of it."""

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from genailab_helpers.checkpoints import cache_folder, whole_file, whole_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path_factory.mktemp("cache")))


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


def refuse(folder: Path) -> None:
    raise FileExistsError(f"{folder}: holds what must stay")


def allow(folder: Path) -> None:
    assert (folder / "mine").read_text() == "precious"


@pytest.mark.parametrize(("disposable", "message"), [
    (None, "expected a new or empty folder"), (refuse, "must stay")])
def test_a_folder_that_must_stay_is_refused_before_work_begins(tmp_path, disposable, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match=message), whole_folder(tmp_path / "run", disposable):
        pytest.fail("the block must not start")
    with pytest.raises(FileExistsError, match="expected a new or empty folder"), \
            whole_folder(tmp_path / "run" / "mine", disposable):
        pytest.fail("nor may it replace a file")
    assert (tmp_path / "run" / "mine").read_text() == "precious"
    assert os.listdir(tmp_path) == ["run"]


def test_a_disposable_folder_is_replaced_and_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    (target / "mine").write_text("precious")

    def write(error: BaseException | None) -> None:
        with whole_folder(target, allow) as temporary:
            assert list(temporary.iterdir()) == []
            (temporary / "new").touch()
            assert os.listdir(target) == ["mine"]
            if error:
                raise error

    for error in (RuntimeError("boom"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write(error)
        assert [path.name for path in tmp_path.rglob("*")] == ["run", "mine"]
    write(None)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "new"]


def test_a_folder_filled_meanwhile_is_not_mixed_with_nor_lost(tmp_path):
    target = tmp_path / "run"

    def write_while_another_does() -> None:
        with whole_folder(target) as temporary:
            (temporary / "ours").touch()
            target.mkdir()
            (target / "theirs").touch()

    with pytest.raises(OSError, match="run"):
        write_while_another_does()
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "theirs"]


def start(code: str, folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(folder)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_and_wait(code: str, folder: Path) -> "subprocess.Popen[str]":
    """Return when the process has said "half", and sleeps."""
    process = start(code, folder)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


WRITE_A_FILE = """
    import sys, time, pathlib
    from genailab_helpers.checkpoints import whole_file
    with whole_file(pathlib.Path(sys.argv[1]) / "target") as temporary, temporary.open("wb") as file:
        file.write(b"new" * 10000); file.flush()
        print("half", flush=True)
        time.sleep(60)
"""
WRITE_A_FOLDER = """
    import sys, time, pathlib
    from genailab_helpers.checkpoints import whole_folder
    with whole_folder(pathlib.Path(sys.argv[1]) / "target", lambda folder: None) as temporary:
        (temporary / "one").write_text("new")
        print("half", flush=True)
        time.sleep(60)
"""
REPLACE_A_FOLDER = """
    import os, sys, time, pathlib
    from genailab_helpers.checkpoints import whole_folder
    replace = os.replace
    def replace_the_first(*paths):
        replace(*paths)
        print("half", flush=True)
        time.sleep(60)
    os.replace = replace_the_first  # the old folder is aside, the new one is not yet in its place
    with whole_folder(pathlib.Path(sys.argv[1]) / "target", lambda folder: None) as temporary:
        (temporary / "one").write_text("new")
"""
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


@posix
def test_a_kill_in_the_middle_of_a_file_leaves_the_old_one_and_does_not_hinder_the_next_run(tmp_path):
    target = tmp_path / "target"
    target.write_text("old")
    kill(start_and_wait(WRITE_A_FILE, tmp_path))
    assert target.read_text() == "old"
    with whole_file(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


@posix
@pytest.mark.parametrize("code", [WRITE_A_FOLDER, REPLACE_A_FOLDER], ids=["written", "replaced"])
def test_the_next_run_finds_the_old_folder_and_removes_what_a_killed_one_left(tmp_path, code):
    target, other = tmp_path / "target", tmp_path / ".target-mine.old"
    for folder in (target, other):
        folder.mkdir()
        (folder / "mine").write_text("precious")
    kill(start_and_wait(code, tmp_path))
    assert len(os.listdir(tmp_path)) > 2 - (code is REPLACE_A_FOLDER)  # it did leave something
    with pytest.raises(FileExistsError, match="expected a new or empty folder"), whole_folder(target):
        pytest.fail("the old folder is back, and full")
    assert sorted(os.listdir(tmp_path)) == [other.name, "target"]  # what nobody killed has left stays
    with whole_folder(target, allow) as temporary:
        (temporary / "two").touch()
    assert os.listdir(target) == ["two"]
    assert sorted(os.listdir(tmp_path)) == [other.name, "target"]


@posix
def test_two_processes_do_not_write_one_folder(tmp_path):
    process = start_and_wait(WRITE_A_FOLDER, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for target in (tmp_path / "target", tmp_path / "link" / "target"):
        with pytest.raises(FileExistsError, match="target: another run is writing it"), whole_folder(target):
            pytest.fail("the block must not start")
    with whole_folder(tmp_path / "other"):
        pass
    kill(process)
    with whole_folder(tmp_path / "target"):  # the lock of a killed process is none
        pass


@posix
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_disk_without_room_is_one_clear_error_and_changes_nothing(tmp_path, kind):
    code = f"""
        import resource, signal, sys, pathlib
        from genailab_helpers.checkpoints import whole_file, whole_folder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        target = pathlib.Path(sys.argv[1]) / "target"
        disposable = [] if "{kind}" == "file" else [lambda folder: None]
        try:
            with whole_{kind}(target, *disposable) as temporary:
                (temporary if "{kind}" == "file" else temporary / "inside").write_bytes(b"new" * 10000)
        except OSError as error:
            print(error)
    """
    old = tmp_path / "target" / "mine" if kind == "folder" else tmp_path / "target"
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    said, errors = start(code, tmp_path).communicate()
    assert errors == ""
    assert said == f"[Errno 27] File too large: '{tmp_path / 'target'}'\n"
    assert os.listdir(tmp_path) == ["target"]
    assert old.read_text() == "old"


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("GENAILAB_CACHE", str(tmp_path / "a" / "b"))
    assert cache_folder() == tmp_path / "a" / "b"
    assert cache_folder().is_dir()
    monkeypatch.delenv("GENAILAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "genailab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "genailab"
    monkeypatch.setattr(os.path, "expanduser", str)  # no HOME, and a user whom the system does not know
    with pytest.raises(FileNotFoundError, match="no home for a cache; set GENAILAB_CACHE"):
        cache_folder()
