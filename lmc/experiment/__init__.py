"""Experiments on vLLM: a YAML file in; rows, a table and a figure out."""
