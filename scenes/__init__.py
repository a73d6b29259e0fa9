"""Rendered scenes whose layers, depth and light are known: what the mini family learns from, and what the node Render
scene draws.
"""
