"""The real frontend in Chromium, on the session's ComfyUI."""

from __future__ import annotations

from pathlib import Path

import chromium
import pytest
import requests

PICTURES = Path(__file__).resolve().parents[2] / "output" / "browser"
# No GPU, and none of the browser's own errands on the network
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--use-gl=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--no-first-run",
    "--disable-dev-shm-usage",
]
READY = """() => window.app?.graph && window.LiteGraph && LiteGraph.registered_node_types.Strata_SliceByDepth
    && !document.querySelector('#comfyui-body-loading') && window.app.vueAppReady"""
# What the frontend reports of itself on an older or offline host: addresses that it asks for and does not get
FOREIGN = (
    "favicon",
    "/userdata",
    "/releases",
    "api.comfy.org",
    "user.css",
    "/jobs",
    "[Jobs API]",
    "JobsApiError",
    "huggingface.co",
    "fetching file size",
    "workflow_templates",
    "net::ERR",
)


@pytest.fixture(scope="session")
def browser():
    path = chromium.find()
    if path is None:
        pytest.skip(
            "no Chromium on PATH: `make test` installs it where it may; elsewhere install chromium or set CHROMIUM to "
            "its path"
        )
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    with playwright.sync_playwright() as engine:
        process = engine.chromium.launch(executable_path=path, args=ARGS)
        yield process
        process.close()


# A screen of at most 16 pictures a second on which nothing moves by itself: without a GPU the processor draws them
SLOW_SCREEN = """{
    const next = window.requestAnimationFrame.bind(window);
    window.requestAnimationFrame = (draw) => setTimeout(() => next(draw), 60);
    window.cancelAnimationFrame = clearTimeout;
    document.addEventListener("DOMContentLoaded", () => {
        const still = "*, *::before, *::after { animation: none !important; transition: none !important; }";
        document.head.append(Object.assign(document.createElement("style"), { textContent: still }));
    });
}"""


class Editor:
    """ComfyUI's page: what a person does in it, and what it holds."""

    def __init__(self, page, url: str, mode: str):
        self.page, self.url, self.mode, self.errors = page, url, mode, []
        page.on("pageerror", lambda error: self.errors.append(f"page: {error}"))
        page.on("console", lambda message: message.type == "error" and self.note(message))

    def note(self, message) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if not any(word in text for word in FOREIGN):
            self.errors.append(text)

    def open(self) -> Editor:
        setting = f"{self.url}/settings/Comfy.VueNodes.Enabled"
        requests.post(setting, json=self.mode == "nodes2", timeout=10).raise_for_status()
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=60_000)
        assert not [error for error in self.errors if "Strata" in error]
        self.errors.clear()  # what an older host's own start-up says
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
            app.api.addEventListener('execution_error', 
                (event) => fail(new Error(event.detail.exception_message)), { once: true });
        }); }""")
        self.page.evaluate("() => app.queuePrompt(0, 1)")
        self.page.evaluate("() => window.ran")

    def fit(self) -> None:
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")

    def show(self, node_type: str) -> None:
        """Bring the first node of a type to the left of the window, at 100 %.

        Drawn before anybody clicks: until then its widgets have no place, and a click finds no node.
        """
        self.page.evaluate(
            """async (type) => {
            const node = app.graph.nodes.find((node) => node.type === type);
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [150 - node.pos[0], 140 - node.pos[1]];
            app.canvas.draw(true, true);
            await new Promise(requestAnimationFrame); // what lies over the canvas follows it
        }""",
            node_type,
        )

    def widget(self, node_type: str, name: str):
        script = (
            "([type, name]) => app.graph.nodes.find((n) => n.type === type).widgets.find((w) => w.name === name).value"
        )
        return self.page.evaluate(script, [node_type, name])

    def set_widget(self, node_type: str, name: str, value) -> None:
        """As the frontend does when somebody has typed into it."""
        self.page.evaluate(
            """([type, name, value]) => {
            const node = app.graph.nodes.find((n) => n.type === type);
            const widget = node.widgets.find((w) => w.name === name);
            widget.value = value;
            widget.callback?.(value, app.canvas, node);
        }""",
            [node_type, name, value],
        )

    def picture(self, name: str) -> None:
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=PICTURES / f"{name}.png")


@pytest.fixture(scope="session")
def site(comfy) -> str:
    """Address of a ComfyUI whose frontend has had its first start."""
    requests.post(comfy.url + "/settings/Comfy.TutorialCompleted", json=True, timeout=10).raise_for_status()
    return comfy.url


@pytest.fixture(scope="module")
def pages():
    """The pages that a module's tests have opened, by their mode."""
    opened = {}
    yield opened
    for editor in opened.values():
        editor.page.context.close()


@pytest.fixture(params=["canvas", "nodes2"])
def editor(request, browser, site, pages) -> Editor:
    """The page with an empty graph and no errors yet, once with the classic canvas and once with Nodes 2.0.

    Both modes of a test come one after the other: of a run's nodes ComfyUI still has the results when the second asks.
    """
    if request.param not in pages:
        context = browser.new_context(viewport={"width": 1600, "height": 1400})
        context.add_init_script(SLOW_SCREEN)
        page = context.new_page()
        page.set_default_timeout(20_000)
        pages[request.param] = Editor(page, site, request.param).open()
    found = pages[request.param]
    found.page.evaluate("() => app.graph.clear()")
    found.errors.clear()
    return found


@pytest.fixture
def japanese(browser, site) -> Editor:
    """The page as somebody sees it who has set ComfyUI to Japanese."""
    requests.post(f"{site}/settings/Comfy.Locale", json="ja", timeout=10).raise_for_status()
    page = browser.new_context(viewport={"width": 1600, "height": 1000}).new_page()
    page.set_default_timeout(20_000)
    yield Editor(page, site, "canvas").open()
    page.context.close()
    requests.post(f"{site}/settings/Comfy.Locale", json="en", timeout=10).raise_for_status()


CALCULATE = """async ([script, call, ...args]) => {
    const result = (await import(script))[call](
        ...args.map((arg) => (arg?.floats ? Float32Array.from(arg.floats) : arg)));
    return ArrayBuffer.isView(result) ? [...result] : result;
}"""


@pytest.fixture(scope="module")
def calculate(request, browser, site):
    """calculate(name, *arguments) calls a function of the script that the test module names as SCRIPT;
    {"floats": [...]} becomes a Float32Array.
    """
    script, page = f"/extensions/ComfyUI-Strata/{request.module.SCRIPT}", browser.new_page()
    page.goto(site + script)
    yield lambda *call: page.evaluate(CALCULATE, [script, *call])
    page.close()
