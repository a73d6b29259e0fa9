"""Nodes of a prompt, and the latents that a running ComfyUI makes of it."""

from safetensors.torch import load_file

SIDE = 64


def node(kind, /, **inputs):
    return {"class_type": kind, "inputs": inputs}


def latents(server, prompt, *links):
    prompt = {
        **prompt,
        **{
            f"save{i}": node("SaveLatent", samples=list(link), filename_prefix="fusion") for i, link in enumerate(links)
        },
    }
    outputs = server.run(prompt)["outputs"]
    references = [outputs[f"save{i}"]["latents"][0] for i in range(len(links))]
    return [
        load_file(server.server.base / "output" / ref["subfolder"] / ref["filename"])["latent_tensor"]
        for ref in references
    ]
