"""Compiler launcher: runs nvcc, and keeps what ptxas -v says in OBJECT.ptxas instead of on the terminal.

Warnings and errors still show. check_ptxas.py reads the logs.
"""

import subprocess
import sys

QUIET = ("ptxas info", "    ", "Compiling entry")

command = sys.argv[1:]
run = subprocess.run(command, stderr=subprocess.PIPE, text=True)
if "-o" in command and "-c" in command:
    with open(command[command.index("-o") + 1] + ".ptxas", "w") as log:
        log.write(run.stderr)
for line in run.stderr.splitlines():
    if run.returncode or (line.strip() and not line.startswith(QUIET)):
        print(line, file=sys.stderr)
sys.exit(run.returncode)
