"""A long random run of one ComfyUI: prompts, interrupts and wrong inputs, and the same probes in between, which must
stay bit-equal.

    python tools/host.py exec tools/soak.py            # 400 prompts, about ten minutes; part of `make test-full`
    python tools/host.py exec tools/soak.py 40 --seed 7

Ends with status 1 when a prompt fails that should not, a probe's picture changes, the server stops, or its memory grows
without end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import threading
import time
from pathlib import Path

import host
import old_graphs
import requests
import run

PROBES = ("mini_transparent_object", "layerfusion_mini", "harmonize_layers_mini", "depth_slice_to_psd")
GRAPHS = (
    *PROBES,
    "mini_text_to_image",
    "object_insertion_mini",
    "edit_and_harmonize_mini",
    "layers_roundtrip",
    "mini_inpaint",
    "depth_swap_background",
    "decompose_several_mini",
    "mini_flux_inpaint",
)
WRONG = ("no such choice", -(10**9), 10**12, "", None, "nan")
GROWTH = 600 * 2**20  # bytes that the server may hold more at the end than after the first quarter


def changed(prompt: dict, chance: random.Random) -> dict:
    """Other seeds and step counts, so that nothing comes from ComfyUI's cache."""
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if name in ("seed", "noise_seed") and not isinstance(value, list):
                node["inputs"][name] = chance.randrange(2**32)
            if name == "steps" and not isinstance(value, list):
                node["inputs"][name] = chance.randint(2, 5)
    return prompt


def broken(prompt: dict, chance: random.Random) -> dict:
    """One input that is not what it should be, or a link to nowhere."""
    node = prompt[chance.choice(sorted(prompt))]
    if node["inputs"]:
        name = chance.choice(sorted(node["inputs"]))
        node["inputs"][name] = chance.choice(WRONG) if chance.random() < 0.8 else ["404", 0]
    return prompt


def prompt_of(client: run.Client, name: str) -> dict:
    """A bundled workflow in API format."""
    return client.to_api(json.loads((host.PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8")))


def shown(client: run.Client, name: str) -> str:
    """The probe's pictures as one hash. ComfyUI is told to free its models and results before; what ran last it may
    still take from there.
    """
    requests.post(client.url + "/free", json={"unload_models": True, "free_memory": True}, timeout=60)
    entry = client.run(prompt_of(client, name))
    found = [
        old_graphs.digest(picture) for pictures in old_graphs.pictures(client, entry).values() for picture in pictures
    ]
    return hashlib.sha256("".join(found).encode()).hexdigest()[:16]


def held(server: host.Server) -> int:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", nargs="?", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, faults, memory = random.Random(options.seed), [], []
    base = host.PACK / "output" / "soak"
    found = host.find_or_install()
    with host.Server(found, base) as server:
        host.copy_inputs(found, base)
        client = run.Client(server.url)
        first = {name: shown(client, name) for name in PROBES}
        for number in range(options.count):
            kind = chance.choices(("good", "broken", "interrupted", "probe"), (6, 3, 2, 1))[0]
            name = chance.choice(GRAPHS)
            try:
                if kind == "probe":
                    name = chance.choice(PROBES)
                    if shown(client, name) != first[name]:
                        faults.append(f"prompt {number}: {name} gives another picture than at the start")
                    continue
                prompt = changed(prompt_of(client, name), chance)
                timer = threading.Timer(chance.uniform(0, 3), requests.post, (client.url + "/interrupt",))
                if kind == "interrupted":
                    timer.start()
                try:
                    client.run(broken(prompt, chance) if kind == "broken" else prompt)
                finally:
                    timer.cancel()
                    if kind == "interrupted":
                        timer.join()
            except run.RunError as error:
                if kind == "good":
                    faults.append(f"prompt {number}: {name} failed: {error}")
            if server.process.poll() is not None:
                faults.append(f"prompt {number}: the server stopped after {kind} {name}\n{server.tail()}")
                break
            memory.append(held(server))
            time.sleep(0.05)
            print(
                f"\r{number + 1} of {options.count}, {memory[-1] / 2**20:.0f} MB, {len(faults)} faults",
                end="",
                flush=True,
            )
        print()
        quarter = memory[len(memory) // 4 : len(memory) // 2] or memory
        if server.process.poll() is None and memory and min(memory[-len(memory) // 4 :]) > max(quarter) + GROWTH:
            faults.append(
                f"the server held {max(quarter) / 2**20:.0f} MB after a quarter and {memory[-1] / 2**20:.0f} MB at "
                "the end"
            )
    print("\n".join(faults) or f"{options.count} prompts, nothing failed or grew, every probe bit-equal")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
