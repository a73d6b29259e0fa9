"""A sentence shown on the node that is running, which may be one of ComfyUI's own: web/notes.js draws it. ComfyUI's own
progress texts vanish at the end of the run in newer frontends.
"""

from __future__ import annotations

import logging
import sys

from comfy_execution.utils import get_executing_context


def tell(sentence: str) -> None:
    """Log the sentence, and show it on the running node where a page listens."""
    logging.warning(sentence)
    context, server = get_executing_context(), sys.modules.get("server")
    instance = getattr(getattr(server, "PromptServer", None), "instance", None)
    if context is not None and instance is not None:
        instance.send_sync("strata_note", {"node": context.node_id, "text": sentence}, instance.client_id)
