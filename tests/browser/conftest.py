"""The real frontend in Chromium, on the session's ComfyUI."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import host
import pytest
import requests

PICTURES = Path(__file__).resolve().parents[2] / "output" / "browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
# No GPU, and none of the browser's own errands on the network
ARGS = ["--no-sandbox", "--disable-gpu", "--use-gl=swiftshader", "--enable-unsafe-swiftshader", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-default-apps", "--no-first-run", "--disable-dev-shm-usage"]
READY = """() => window.app?.graph && window.LiteGraph && LiteGraph.registered_node_types.Strata_SliceByDepth
    && !document.querySelector('#comfyui-body-loading') && window.app.vueAppReady"""
# Reported by the frontend itself without any node pack: files that only ComfyUI's own later versions serve, and its telemetry
FOREIGN = ("favicon", "userdata", "/api/releases", "api.comfy.org", "user.css", "workflow_templates", "custom_node_templates", "ERR_NAME_NOT_RESOLVED",
           "ERR_INTERNET_DISCONNECTED", "ERR_CONNECTION")


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH: `make test` installs it where it may, otherwise install chromium and run again")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield chromium
        chromium.close()


class Editor:
    """ComfyUI's page: what a person does in it, and what it holds."""

    def __init__(self, page, url: str):
        self.page, self.url, self.errors = page, url, []
        page.on("pageerror", lambda error: self.errors.append(f"page: {error}"))
        page.on("console", lambda message: message.type == "error" and self.note(message))

    def note(self, message) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if not any(word in text for word in FOREIGN):
            self.errors.append(text)

    def open(self) -> Editor:
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=60_000)
        return self

    def load(self, workflow: dict, name: str = "test") -> None:
        self.page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [workflow, name])

    def load_api(self, prompt: dict) -> None:
        self.page.evaluate("(prompt) => app.loadApiJson(prompt, 'test')", prompt)

    def prompt(self) -> dict:
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def queue(self) -> None:
        """Run the graph from the page and wait until all of its messages have arrived."""
        self.page.evaluate("""() => { window.ran = new Promise((done, fail) => {
            app.api.addEventListener('execution_success', () => done(), { once: true });
            app.api.addEventListener('execution_error', (event) => fail(new Error(event.detail.exception_message)), { once: true });
        }); }""")
        self.page.evaluate("() => app.queuePrompt(0, 1)")
        self.page.evaluate("() => window.ran")

    def fit(self) -> None:
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")

    def view(self, x: float, y: float, scale: float = 1.0) -> None:
        """Show the graph with the point (x, y) at the top left, below the menu."""
        self.page.evaluate("([x, y, s]) => { app.canvas.ds.scale = s; app.canvas.ds.offset = [90 / s - x, 90 / s - y]; app.canvas.setDirty(true, true); }",
                           [x, y, scale])

    def picture(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}.png")


def frontend_version(url: str) -> str:
    return requests.get(url + "/system_stats", timeout=10).json()["system"].get("required_frontend_version", "?")


@pytest.fixture(scope="session")
def site(comfy) -> str:
    """Address of a ComfyUI whose frontend has had its first start."""
    requests.post(comfy.url + "/settings/Comfy.TutorialCompleted", json=True, timeout=10).raise_for_status()
    return comfy.url


@pytest.fixture(params=["canvas", "nodes2"])
def editor(request, browser, site):
    """A fresh page, once with the classic canvas and once with Nodes 2.0."""
    requests.post(site + "/settings/Comfy.VueNodes.Enabled", json=request.param == "nodes2", timeout=10).raise_for_status()
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(20_000)
    editor = Editor(page, site)
    editor.mode = request.param
    yield editor.open()
    context.close()
