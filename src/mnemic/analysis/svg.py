"""Drawings as SVG inside a page: no ids in common, nothing outside the page, a title that is read aloud."""

import io
from xml.etree import ElementTree

from .drawing import Drawing, save


def inline(drawing: Drawing, prefix: str) -> str:
    """The drawing as an <svg> element; `prefix` is put before all its ids."""
    file = io.BytesIO()
    save(drawing, file, "svg")
    # Comments, doctype and the addresses of namespaces do not survive parsing; HTML knows SVG without them.
    svg = ElementTree.fromstring(file.getvalue())
    for parent in list(svg.iter()):
        for child in [c for c in parent if _name(c.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in svg.iter():
        element.tag = _name(element.tag)
        attributes = {_name(key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                value = f"{prefix}{value}"
            elif key == "href":
                value = value.replace("#", f"#{prefix}", 1)
            else:
                value = value.replace("url(#", f"url(#{prefix}")
            element.set(key, value)
    title = ElementTree.Element("title", {"id": f"{prefix}title"})
    title.text = drawing.title
    svg.insert(0, title)
    svg.set("role", "img")
    svg.set("aria-labelledby", f"{prefix}title")
    # matplotlib's rule for all elements, which inside a page would be one for all figures.
    svg.set("style", f"stroke-linejoin: round; stroke-linecap: butt; width: {svg.get('width')}")
    return ElementTree.tostring(svg, encoding="unicode")


def _name(qualified: str) -> str:
    return qualified.rpartition("}")[2]
