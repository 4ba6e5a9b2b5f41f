"""Hit rates and times of a workload, from its trace alone: no model, no torch, no vllm."""
