"""Pure functions of torch and numpy, one file per idea of a paper; nothing here knows ComfyUI."""
