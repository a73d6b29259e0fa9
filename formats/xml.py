"""XML from strangers' files."""

from __future__ import annotations

from xml.etree import ElementTree

NAMESPACE = "https://github.com/ComfyUI-Strata/ComfyUI-Strata"  # of what is our own in files


class _NoDoctype(ElementTree.TreeBuilder):
    # Called before the declarations inside it are read, so that no entity is ever defined or expanded.
    def doctype(self, *_):
        raise ValueError("it declares a DOCTYPE, which layer files do not have")


def parse_xml(data: bytes, what: str) -> ElementTree.Element:
    """The root element; raises ValueError with one sentence for anything but plain well-formed XML."""
    try:
        return ElementTree.fromstring(data, ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{what} cannot be read: {error}.") from error
