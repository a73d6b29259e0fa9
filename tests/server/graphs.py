"""Prompts written node by node, for the tests of nodes in a real ComfyUI."""

import io

import numpy as np
import pytest
import run
from PIL import Image

RED, GREEN, BLUE = 0xFF0000, 0x00FF00, 0x0000FF


class Graph:
    """A prompt written node by node: `add` gives what other nodes' inputs are wired to, the node's first output."""

    def __init__(self, comfy):
        self.comfy, self.prompt = comfy, {}

    def add(self, kind, /, **inputs):
        node = str(len(self.prompt) + 1)
        required = self.comfy.object_info()[kind]["input"].get("required", {})
        defaults = {
            name: spec[1]["default"] for name, spec in required.items() if len(spec) > 1 and "default" in spec[1]
        }
        self.prompt[node] = {"class_type": kind, "inputs": defaults | inputs}
        return [node, 0]

    def colour(self, colour, width=8, height=6, count=1):
        return self.add("EmptyImage", width=width, height=height, batch_size=count, color=colour)

    def rgb(self, **sizes):
        red, green, blue = (self.colour(colour, **sizes) for colour in (RED, GREEN, BLUE))
        return self.add("ImageBatch", image1=self.add("ImageBatch", image1=red, image2=green), image2=blue)

    def layers(self, images, **inputs):
        return self.add("Strata_LayersFromImages", images=images, **inputs)

    def pictures(self, images):
        """Run, and return the pictures that reach a Save Image node, as arrays."""
        saved = self.add("SaveImage", images=images, filename_prefix="edit")
        files = self.comfy.run(self.prompt)["outputs"][saved[0]]["images"]
        return [np.asarray(Image.open(io.BytesIO(self.comfy.download(file)))) for file in files]

    def flat(self, layers, **inputs):
        return self.pictures(self.add("Strata_FlattenLayers", layers=layers, **inputs))[0]

    def names(self, layers):
        """The names of the layers, as a text preview shows them."""
        batch = self.add("Strata_LayersToBatch", layers=layers)
        shown = self.add("PreviewAny", source=[batch[0], 2])
        return self.comfy.run(self.prompt)["outputs"][shown[0]]["text"][0].split("\n")


def assert_refused(graph, sentence):
    """One sentence that says `sentence`, and a server that goes on working."""
    with pytest.raises(run.RunError) as error:
        graph.comfy.run(graph.prompt)
    assert sentence in str(error.value) and "\n" not in str(error.value) and "Traceback" not in str(error.value)
    again = Graph(graph.comfy)
    assert again.flat(again.layers(again.colour(RED)))[0, 0].tolist() == [255, 0, 0, 255]
