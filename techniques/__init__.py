"""Pure functions of torch, numpy and einops, one file per idea of a paper; nothing here knows ComfyUI."""
