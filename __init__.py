"""ComfyUI-Strata: layered images in ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI at start; only then are torch and ComfyUI's own modules imported."""
    import logging

    try:
        from .nodes import StrataExtension

        return StrataExtension()
    except Exception:
        # The host logs only the message of an entrypoint's error; the traceback is what a bug report needs.
        logging.exception("ComfyUI-Strata could not be loaded")
        raise
