"""Harness: tasks, methods, metrics and reports of the benchmarks and the demo.

prompts   long prompts of different kinds, with needles among them
decoder   runs a transformers model with a given attention function
prefill   full attention's cache, queries, continuation and logits of one prompt; kept in files
methods   what decodes on top of a prefill: full, icecache, paper, quest, streaming, topk
quality   runs methods over prompts in one harness; KL, agreement, needles, attended mass
report    the JSON form of all benchmarks, tables, bounds
"""
