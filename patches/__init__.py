"""The only code that knows how ComfyUI samples, attends and loads."""
