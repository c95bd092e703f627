"""What is asked: LongBench, RULER, passkey, GSM8K.

task               Sample, Task: the form that all share
longbench          LongBench v1 and -E: prompts, sources of data, truncation
longbench_prompts  its templates
longbench_output   its files of predictions and results
longbench_v2       LongBench v2: multiple choice
longbench_metrics  scores equal to those of LongBench's eval.py
ruler              RULER's synthetic tasks, generated
passkey            a number in a long text of nothing
gsm8k              grade-school problems with a chain of thought
records            JSON whose errors name file, line and field
"""
