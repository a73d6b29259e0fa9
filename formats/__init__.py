"""Layer files on disk: one module per format, each a pair of read and write over techniques.layers.LayerStack; nothing
here knows ComfyUI.
"""
