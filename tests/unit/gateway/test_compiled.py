"""The compiled path of a request: found only for the very sources that run, and the same in use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudlm.gateway import compiled


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    """What ``put`` leaves is trusted, whoever runs this."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLOUDLM_NATIVE_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    return tmp_path


def put(cache: Path, modules: tuple[str, ...] = compiled.MODULES) -> Path:
    """What a build leaves, as far as names go."""
    folder = cache / compiled._name(modules)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in (*(f"cloudlm/gateway/{one.replace('.', '/')}" for one in modules), "a1b2__mypyc"):
        file = folder / f"{name}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no library")
    return folder


def test_all_modules_are_there_and_are_the_gateways() -> None:
    package = Path(compiled.__file__).parent
    missing = [
        name
        for name in compiled.MODULES
        if not (package / name.replace(".", "/")).with_suffix(".py").is_file()
    ]
    assert not missing


def test_nothing_is_found_where_nothing_was_compiled(cache: Path) -> None:
    assert compiled.find() is None
    assert compiled.use() is None


def test_what_other_sources_were_compiled_to_is_not_found(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "src"
    source = root / "cloudlm/gateway/limits.py"
    source.parent.mkdir(parents=True)
    source.write_text("A = 1\n", "utf-8")
    monkeypatch.setattr(compiled, "_ROOT", root)
    put(cache)
    assert compiled.find() is not None
    source.write_text("A = 2\n", "utf-8")
    assert compiled.find() is None
    source.write_text("A = 1\n", "utf-8")
    assert compiled.find() is not None
    (root / "cloudlm/core").mkdir()
    (root / "cloudlm/core/chat.py").write_text("", "utf-8")  # what it stands on counts too
    assert compiled.find() is None


def test_it_is_not_used_once_sources_were_imported(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cloudlm.gateway.limits

    assert cloudlm.gateway.limits.Tally
    put(cache)
    before = list(sys.meta_path)
    assert compiled.use() is None
    assert sys.meta_path == before


def test_some_of_the_modules_are_none(cache: Path) -> None:
    folder = put(cache)
    assert compiled.find() == folder
    next(folder.rglob("limits.*")).unlink()
    assert compiled.find() is None


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_what_others_could_have_written_is_not_run(cache: Path, mode: int) -> None:
    folder = put(cache)
    assert compiled.find() == folder
    for place in (folder, cache):
        before = place.stat().st_mode & 0o777
        place.chmod(mode)
        assert compiled.find() is None
        place.chmod(before)
    assert compiled.find() == folder


@pytest.mark.parametrize("mode", [0o777, 0o775])
@pytest.mark.parametrize("inside", ["cloudlm", "cloudlm/gateway", "cloudlm/gateway/limits", ""])
def test_what_others_could_have_put_deep_inside_is_not_run(
    cache: Path, mode: int, inside: str
) -> None:
    """Every file that is loaded, the folders on the way to it, and what all of them share."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folder = put(cache)
    place = folder / (inside or f"a1b2__mypyc{suffix}")
    place = place if place.exists() else place.with_name(f"{place.name}{suffix}")
    before = place.stat().st_mode & 0o777
    place.chmod(mode)
    assert compiled.find() is None
    place.chmod(before)
    assert compiled.find() == folder


_FAKE = """
import sys, sysconfig
from pathlib import Path
for name in ("cloudlm/gateway/capacity", "cloudlm/gateway/retry", "a1b2__mypyc"):
    file = Path(sys.argv[1], "library", name + sysconfig.get_config_var("EXT_SUFFIX"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("compiled")
"""
"""In the compiler's place: leaves folders and files as the process's umask has them."""


def test_what_is_built_is_found_whatever_the_umask_is(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_BUILD", _FAKE)
    names = ("capacity", "retry")
    os.umask(0o002)
    folder = compiled.build(names)
    assert compiled.find(names) == folder


@pytest.mark.parametrize("inside", ["", "cloudlm/gateway"])
def test_what_others_could_have_written_is_built_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    names = ("capacity", "retry")
    folder = put(cache, names)
    (folder / inside).chmod(0o775)
    monkeypatch.setattr(compiled, "_BUILD", _FAKE)
    assert compiled.build(names) == folder
    assert compiled.find(names) == folder
    assert {file.read_text() for file in compiled._files(folder).values()} == {"compiled"}
    assert list(cache.iterdir()) == [folder]
    monkeypatch.setattr(compiled, "_BUILD", "raise SystemExit('built once more')")
    assert compiled.build(names) == folder


def test_nothing_is_compiled_where_others_may_write(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Minutes of work for what would never be used: the answer comes first, and says what to do."""
    monkeypatch.setattr(compiled, "_BUILD", "raise SystemExit('it was begun')")
    put(cache)
    cache.chmod(0o777)
    assert compiled.main() == 1
    said = capsys.readouterr().err
    assert str(cache) in said
    assert "chmod go-w" in said
    assert "CLOUDLM_NATIVE_CACHE" in said
    assert "it was begun" not in said


def test_an_unfinished_build_has_the_name_that_prune_goes_by(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BUILDING", "unfinished-")
    monkeypatch.setattr(compiled, "_BUILD", "import sys; sys.exit(print(sys.argv[1]) or 1)")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        compiled.build(("capacity", "retry"))
    assert Path(failed.value.stdout.strip()).name.startswith("unfinished-")


def test_what_cannot_be_loaded_is_left_alone(cache: Path) -> None:
    names = ("capacity", "retry")
    put(cache, names)
    code = (
        "from cloudlm.gateway import compiled\n"
        f"assert compiled.find({names}) is not None\n"
        f"assert compiled.use({names}) is None\n"
        "from cloudlm.gateway import retry\n"
        "print(retry.__file__.endswith('.py'))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr


def test_installations_share_what_their_user_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLOUDLM_NATIVE_CACHE", raising=False)
    monkeypatch.setenv("CLOUDLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert compiled.find() is None
    assert put(tmp_path / "cache/cloudlm/native") == compiled.find()


_TRY = """
import sys
from cloudlm.gateway import compiled
wanted = ("capacity", "retry")
folder = compiled.build(wanted)
assert compiled.use(wanted) == folder
from cloudlm.gateway import retry
assert not retry.__file__.endswith(".py"), retry.__file__
budget = retry.RetryBudget()
budget.count_request(1.0)
print([budget.take(2.0) for _ in range(4)], *sorted(one.name for one in folder.parent.iterdir()))
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.skipif(
    not Path(sysconfig.get_path("include"), "Python.h").is_file(), reason="no headers of Python"
)
@pytest.mark.timeout(1800)
def test_a_module_is_compiled_and_does_the_same(cache: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", _TRY], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "[True,",
        "True,",
        "True,",
        "False]",
        compiled._name(("capacity", "retry")),
    ]


def test_a_compiler_that_fails_is_told_in_words(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "_BUILD", "print('cc: no such file'); raise SystemExit(1)")
    assert compiled.main() == 1
    said = capsys.readouterr().err
    assert "cc: no such file" in said
    assert "runs from its sources" in said
    assert list(cache.iterdir()) == []
