"""Where every speed that the project states comes from; `hta-bench` runs it.

rivals.py holds the other ways to do the step, workloads.py what they are run on, measure.py how they are timed,
plots.py the pictures, cli.py the command line. Installed as hta_fused_bench.
"""
