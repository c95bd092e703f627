"""Harness: tasks, methods, metrics and reports of the benchmarks and the demo.

tasks        what is asked and how it is judged: LongBench, RULER, GSM8K, passkey
suites       tasks by suite, and where their samples come from
decoder      runs a transformers model by itself, or with its full attention taken over
runs         sequences under way: the model's own, and those that methods decode
cache_layers the full-attention layers of a model's cache
dense_cache  keys and values of a layer
prefill      full attention's cache, queries, answer and logits of one prompt; kept in files
session      one sequence under one method: the interface of all methods
methods      the methods by name: full, icecache, paper, topk, and those of `baselines`
baselines    other papers' methods at the same budget
compare      many methods on one prefill
ask          one sample: its prompt in tokens, and what every method makes of it
runner       runs that go on after a kill
evaluate     one run of a suite, and its files
scores       numbers of a run
html_report  the same as a page
html_page    what such pages are made of
tables       tables of such numbers, on pages and terminals
generation   texts fed token by token from a short prompt on: a run and its files
generation_plan    what it is asked for
generation_report  its numbers and its page
growth       methods along a text, beside indexes built at the moment
free_text    what methods write by themselves, and what full attention makes of it
writing      rows that write on to the ends of what they write
quality      what bench_quality measures: KL, agreement, needles, attended mass
summary      its numbers and bounds
prompts      its prompts
libraries    packages and data that only some parts need
names        names that nothing has
step         time of one decode step
report       the JSON form of all benchmarks
"""
