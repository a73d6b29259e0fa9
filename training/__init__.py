"""Rendered scenes with exact truth, and the trainers of the mini models."""
