"""Compiler launcher: runs nvcc, and keeps what ptxas -v says in OBJECT.ptxas instead of on the terminal.

Warnings and errors still show. The log also gets the processor time. check_ptxas.py reads the logs.
"""

import resource
import subprocess
import sys

QUIET = ("ptxas info", "    ", "Compiling entry")

command = sys.argv[1:]
run = subprocess.run(command, stderr=subprocess.PIPE, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
if "-o" in command and "-c" in command:
    with open(command[command.index("-o") + 1] + ".ptxas", "w") as log:
        log.write(f"{run.stderr}processor time: {used.ru_utime + used.ru_stime:.2f} s\n")
for line in run.stderr.splitlines():
    if run.returncode or (line.strip() and not line.startswith(QUIET)):
        print(line, file=sys.stderr)
sys.exit(run.returncode)
