"""A shadow pager's state as plain values: which pages there are, how they hang together, where each frame is mapped.

The tables themselves are in machine memory. The order of everything is kept: pages are recycled in it.
"""

from __future__ import annotations

from typing import Any

from vmlab.vmm.shadow_page import ShadowPage, View


def pages_of(pages: list[ShadowPage]) -> list[dict[str, Any]]:
    """Each page with its number in the list in place of a reference."""
    number = {id(page): at for at, page in enumerate(pages)}
    return [{"key": tuple(part.name if isinstance(part, View) else part for part in page.key), "frame": page.frame,
             "has_global": page.has_global,
             "parents": [(at, number[id(parent)]) for at, parent in page.parents.items()],
             "children": [(index, number[id(child)]) for index, child in page.children.items()]} for page in pages]


def pages_from(state: list[dict[str, Any]]) -> list[ShadowPage]:
    """The pages that :func:`pages_of` described."""
    pages = []
    for one in state:
        gfn, level, quadrant, access, direct, hole, view, base = one["key"]
        page = ShadowPage((gfn, level, quadrant, access, direct, hole, View[view], base), one["frame"])
        page.has_global = one["has_global"]
        pages.append(page)
    for page, one in zip(pages, state, strict=True):
        page.parents = {at: pages[number] for at, number in one["parents"]}
        page.children = {index: pages[number] for index, number in one["children"]}
    return pages
