"""Run one workflow file, saved from the editor (UI format) or in API format, through ComfyUI's API, and print the files
it made.

    python tools/host.py exec tools/run.py workflows/depth_slice_to_psd.json --set "Slice by depth.thresholds=0.3, 0.6"
    --out pictures

--set takes NODE.INPUT=VALUE; NODE is a node's id, its title or its type. VALUE is read as the input's type; for an
input with choices, a file here is uploaded first, under another name where ComfyUI has a different file of that name.
--list shows what can be set.
Without --server a ComfyUI with this pack is started for the run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import host
import requests
import websocket
from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api
from tqdm import tqdm

BASE = host.PACK / "output" / "comfyui"  # of a ComfyUI that is started for a run
QUIET = 5  # seconds without a message, after which the queue is asked


class RunError(RuntimeError):
    """A workflow that could not be read or run; the message is for the person who asked for it."""


class Client:
    """ComfyUI's HTTP and WebSocket API, as much of it as running a workflow takes."""

    def __init__(self, url: str):
        self.url = (url if url.startswith(("http://", "https://")) else f"http://{url}").rstrip("/")
        self.id = uuid.uuid4().hex
        self._object_info = None

    def get(self, path: str, **query):
        try:
            answer = requests.get(self.url + path, params=query, timeout=60)
        except requests.ConnectionError as error:
            raise RunError(
                f"No ComfyUI answers at {self.url}; start it, or leave --server out to have one started."
            ) from error
        except requests.RequestException as error:
            raise RunError(
                f"{self.url} cannot be asked ({error}); give --server as in http://127.0.0.1:8188."
            ) from error
        answer.raise_for_status()
        return answer

    def object_info(self) -> dict:
        if self._object_info is None:
            self._object_info = self.get("/object_info").json()
        return self._object_info

    def lacks(self, workflow: str) -> set[str]:
        """Nodes of a bundled workflow that this ComfyUI is too old for."""
        return host.NEWER.get(workflow, set()) - self.object_info().keys()

    def upload(self, path: Path) -> str:
        """Put a file into ComfyUI's input folder; returns the name that load nodes take."""
        with open(path, "rb") as handle:
            answer = requests.post(self.url + "/upload/image", files={"image": (path.name, handle)}, timeout=300)
        answer.raise_for_status()
        return answer.json()["name"]

    def to_api(self, workflow: dict) -> dict:
        """A workflow in API format: {node id: {class_type, inputs}}. Raises RunError for nodes that this ComfyUI does
        not have.
        """
        try:
            prompt = convert_ui_to_api(workflow, self.object_info())
        except WorkflowConversionError as error:
            raise RunError(f"This is not a ComfyUI workflow: {error}") from error
        missing = sorted({node["class_type"] for node in prompt.values()} - self.object_info().keys())
        if missing:
            raise RunError(f"This ComfyUI has no node {', '.join(missing)}; install the node pack that it belongs to.")
        # Buttons leave an empty value, which the converter gives to the input that has come after them.
        for node in prompt.values():
            optional = self.object_info()[node["class_type"]]["input"].get("optional", {})
            node["inputs"] = {
                name: value for name, value in node["inputs"].items() if value is not None or name not in optional
            }
        return prompt

    def run(self, prompt: dict, progress: bool = False) -> dict:
        """Queue a prompt, wait for it and return its history entry; raises RunError with ComfyUI's own words."""
        socket = websocket.create_connection(f"ws{self.url[4:]}/ws?clientId={self.id}", timeout=1800)
        try:
            request = {
                "prompt": prompt,
                "client_id": self.id,
                "extra_data": {"extra_pnginfo": {"workflow": {"api": prompt}}},
            }
            answer = requests.post(self.url + "/prompt", json=request, timeout=60)
            if answer.status_code != 200:
                raise RunError(_node_errors(answer.json(), prompt))
            prompt_id = answer.json()["prompt_id"]
            if answer.json().get("node_errors"):  # ComfyUI would run the other outputs alone
                requests.post(self.url + "/queue", json={"delete": [prompt_id]}, timeout=60)
                raise RunError(_node_errors(answer.json(), prompt))
            self._follow(socket, prompt_id, prompt, progress)
        finally:
            socket.close()
        while not (history := self.get(f"/history/{prompt_id}").json()):  # written a moment after the last message
            time.sleep(0.01)
        entry = history[prompt_id]
        for kind, message in entry["status"]["messages"]:
            if kind == "execution_error":
                raise RunError(f"{_label(prompt, message['node_id'])}: {message['exception_message'].strip()}")
            if kind == "execution_interrupted":
                raise RunError("The run was interrupted.")
        return entry

    def _follow(self, socket, prompt_id: str, prompt: dict, progress: bool) -> None:
        """Read messages until the prompt has ended, whatever the end was. Raises RunError when it never will."""
        bar = tqdm(total=len(prompt), disable=not progress, unit="node", leave=False)
        finished: set[str] = set()
        socket.settimeout(QUIET)
        with bar:
            while True:
                try:
                    message = socket.recv()
                except websocket.WebSocketTimeoutException:
                    if self._is_gone(prompt_id):
                        raise RunError("The workflow was removed from ComfyUI's queue before it ran.") from None
                    continue
                except (websocket.WebSocketException, OSError) as error:
                    raise RunError(
                        f"The ComfyUI at {self.url} ended while the workflow ran; its log says why."
                    ) from error
                if not message:
                    raise RunError(f"The ComfyUI at {self.url} ended while the workflow ran; its log says why.")
                if isinstance(message, bytes):  # a preview picture
                    continue
                message = json.loads(message)
                data = message["data"]
                if data.get("prompt_id") != prompt_id:
                    continue
                kind = message["type"]
                if kind in ("execution_success", "execution_error", "execution_interrupted"):
                    return
                if kind == "execution_cached":
                    finished |= set(data["nodes"])
                elif kind == "executed":
                    finished.add(data["node"])
                elif kind == "executing" and data["node"]:
                    bar.set_description(_label(prompt, data["node"]))
                elif kind == "progress_state":
                    finished |= {node for node, state in data["nodes"].items() if state["state"] == "finished"}
                bar.n = min(len(finished), bar.total)
                bar.refresh()

    def _is_gone(self, prompt_id: str) -> bool:
        """Neither waiting nor running nor done."""
        queue = self.get("/queue").json()
        waiting = {entry[1] for entries in (queue["queue_running"], queue["queue_pending"]) for entry in entries}
        return prompt_id not in waiting and not self.get(f"/history/{prompt_id}").json()

    def files(self, entry: dict) -> list[dict]:
        """References {filename, subfolder, type} of every file that a run reports, previews in the temp folder left
        out.
        """
        found = []
        for output in entry["outputs"].values():
            for items in output.values():
                found += [
                    item
                    for item in items
                    if isinstance(item, dict) and item.get("type") == "output" and item not in found
                ]
        return found

    def download(self, reference: dict) -> bytes:
        return self.get("/view", **reference).content


def _label(prompt: dict, node_id: str) -> str:
    node = prompt.get(node_id, {})
    return node.get("_meta", {}).get("title") or node.get("class_type", node_id)


def _node_errors(answer: dict, prompt: dict) -> str:
    lines = [
        f"{_label(prompt, node_id)}: {error['message']} ({error['details']})"
        for node_id, node in (answer.get("node_errors") or {}).items()
        for error in node["errors"]
    ]
    return "\n".join(lines) or answer.get("error", {}).get("message", "ComfyUI refused the workflow.")


def read_workflow(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise RunError(f"{path} is not JSON ({error}); save the workflow from ComfyUI's menu.") from error


def set_input(prompt: dict, assignment: str, client: Client) -> None:
    """Apply one NODE.INPUT=VALUE to a prompt."""
    target, found, value = assignment.partition("=")
    node_key, dot, name = target.rpartition(".")
    if not found or not dot:
        raise RunError(f"--set {assignment}: write NODE.INPUT=VALUE.")
    nodes = [node for node_id, node in prompt.items() if node_key in (node_id, *_titles(node), node["class_type"])]
    if len(nodes) != 1:
        labels = ", ".join(f"{node_id} ({_label(prompt, node_id)})" for node_id in prompt)
        raise RunError(f"--set {assignment}: {len(nodes)} nodes are called {node_key!r}; the workflow has {labels}.")
    inputs = nodes[0]["inputs"]
    if name not in inputs:
        raise RunError(f"--set {assignment}: {node_key!r} has no input {name!r}; it has {', '.join(inputs)}.")
    inputs[name] = typed(value, spec_of(client, nodes[0]["class_type"], name), inputs[name], assignment, client)


def _titles(node: dict) -> tuple[str, str]:
    """A node's title, and without what stands behind it in brackets: Slice by depth (depth slicer)."""
    title = node.get("_meta", {}).get("title") or ""
    return title, title.partition(" (")[0]


def spec_of(client: Client, kind: str, name: str) -> list:
    """[type or choices, options] of an input, as ComfyUI describes it; of a dynamic input [None, {}]."""
    groups = client.object_info()[kind]["input"]
    spec = next((group[name] for group in groups.values() if isinstance(group, dict) and name in group), [None])
    return [spec[0], spec[1] if len(spec) > 1 else {}]


def typed(value: str, spec: list, old, assignment: str, client: Client):
    """The value of the command line as its input's type. Raises RunError where it is none."""
    kind, options = spec
    choices = kind if isinstance(kind, list) else options.get("options", []) if kind == "COMBO" else None
    if choices is not None:
        chosen = next((choice for choice in choices if str(choice) == value), value)
        return client.upload(Path(value)) if chosen is value and value not in choices and _is_file(value) else chosen
    if kind in ("INT", "FLOAT"):
        try:
            return int(value) if kind == "INT" else float(value)
        except ValueError:
            raise RunError(f"--set {assignment}: {value!r} is not a number.") from None
    if kind == "BOOLEAN":
        words = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }
        if value.lower() not in words:
            raise RunError(f"--set {assignment}: write true or false.")
        return words[value.lower()]
    if kind == "STRING" or isinstance(old, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except (OSError, ValueError):  # a text that is too long for a name, or has a NUL in it
        return False


def listed(prompt: dict, client: Client) -> str:
    """A line for each value that --set can change: NODE.INPUT=VALUE, with its type or choices."""
    lines = []
    for node_id, node in prompt.items():
        for name, value in node["inputs"].items():
            if not isinstance(value, list):  # a link
                kind, _ = spec_of(client, node["class_type"], name)
                about = ", ".join(map(str, kind)) if isinstance(kind, list) else kind or "any"
                lines.append(f"{node_id}.{name}={value}    ({_label(prompt, node_id)}; {about[:160]})")
    return "\n".join(lines)


def run_file(
    client: Client, path: Path, settings: list[str], out: Path | None, progress: bool = True
) -> list[Path | str]:
    """Run a workflow file; returns the files: copies in `out`, or their names in ComfyUI's output folder."""
    prompt = client.to_api(read_workflow(path))
    for assignment in settings:
        set_input(prompt, assignment, client)
    made = []
    for reference in client.files(client.run(prompt, progress)):
        name = Path(reference["subfolder"]) / reference["filename"]
        if out is None:
            made.append(str(name))
            continue
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(client.download(reference))
        made.append(target)
    return made


@contextmanager
def connected(server: str | None) -> Iterator[Client]:
    """That ComfyUI, or one that is started for the run and keeps its files below output/comfyui."""
    if server:
        yield Client(server)
        return
    found = host.find_or_install()
    host.copy_inputs(found, BASE)
    with host.Server(found, BASE) as own:
        yield Client(own.url)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE")
    parser.add_argument(
        "--out", type=Path, help="copy the files there (default: leave them in ComfyUI's output folder)"
    )
    parser.add_argument("--server", help="URL of a running ComfyUI; started for the run when not given")
    parser.add_argument("--list", action="store_true", help="show what --set can change, and run nothing")
    options = parser.parse_args()
    try:
        if options.out and options.out.exists() and not options.out.is_dir():
            raise RunError(f"--out {options.out}: this is a file; give a folder.")
        read_workflow(options.workflow)
        with connected(options.server) as client:
            if options.list:
                made = [listed(client.to_api(read_workflow(options.workflow)), client)]
            else:
                made = run_file(client, options.workflow, options.set, options.out)
                if not options.out and not options.server:
                    made = [BASE / "output" / name for name in made]
        print("\n".join(str(name) for name in made))
    except (RunError, host.HostError, requests.RequestException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
