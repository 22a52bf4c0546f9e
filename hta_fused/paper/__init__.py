"""The paper's small experiments, a room each, and `hta-reproduce`, which runs them.

Rooms: table1.py, figure1.py, convergence.py, quadratic.py (each a `run(out, quick)` and its picture), report.py what they
write and print, cli.py the command. Everything is seeded. Imports the rest of the package; nothing imports it but its
tests.
"""
