"""Engines that reuse KV through lmc: one package each."""
