"""What Krita sees of layer files, run by kritarunner with Krita's own Python: <file>.json beside each, lowest layer
first, with the pixels as base64, and what Krita shows of the whole image. STRATA_FILES names a text with a path a line.
"""

import base64
import json
import os

from krita import Krita
from PyQt5.QtGui import QImage

RGBA = QImage.Format_RGBA8888  # what a screen of sRGB shows


def pixels(node):
    box = node.bounds()
    place = [box.x(), box.y(), box.width(), box.height()]
    return {"box": place, "data": base64.b64encode(bytes(node.pixelData(*place))).decode()}


def described(node):
    kind, own = node.type(), {"name": node.name(), "opacity": node.opacity() / 255, "mode": node.blendingMode()}
    own |= {"visible": node.visible(), "depth": node.colorDepth()}
    if kind == "grouplayer":
        layers = [child for child in node.childNodes() if child.type() != "transparencymask"]
        return own | {"passes": node.passThroughMode(), "layers": [described(child) for child in layers]}
    masks = [pixels(child) for child in node.childNodes() if child.type() == "transparencymask"]
    return own | {"kind": kind, "pixels": pixels(node), "masks": masks}


def main(*_):
    krita = Krita.instance()
    krita.setBatchmode(True)
    with open(os.environ["STRATA_FILES"], encoding="utf-8") as listed:
        paths = listed.read().splitlines()
    for path in paths:
        document = krita.openDocument(path)
        found = {"version": krita.version()}
        if document:
            document.waitForDone()
            shown = document.projection(0, 0, document.width(), document.height()).convertToFormat(RGBA)
            whole = base64.b64encode(shown.constBits().asstring(shown.byteCount())).decode()
            found |= {"layers": described(document.rootNode())["layers"], "shown": whole}
        with open(path + ".json", "w", encoding="utf-8") as file:
            json.dump(found, file)
        if document:
            document.close()
