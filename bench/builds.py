"""Another build of flashjax, timed beside the installed one: each runs in a process of its own, burst by burst.

    python -m bench.run --suite h200-forward --build before=SITE ...  # a folder as .ci/gpu leaves it in build/gpu/site

Two builds cannot share a process, for they register the same names. Here one waits for its turn at the end of a pipe,
with its arrays, while others use the device.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from bench.cells import Cell
from bench.impls import Flashjax


class Build:
    """An implementation as in bench.impls; `site` is the folder that holds the package."""

    def __init__(self, site: str):
        self.site = os.path.realpath(site)

    def load(self):
        path = os.pathsep.join(filter(None, (self.site, os.environ.get("PYTHONPATH"))))
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # nobody takes all of the device
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.builds"],
            cwd=pathlib.Path(__file__).parents[1],
            env=memory | os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            where = self._ask({})
        except NotImplementedError as error:
            where = error
        if self.site != os.path.dirname(os.path.dirname(os.path.realpath(str(where)))):
            self.close()
            raise ImportError(f"no flashjax in {self.site}, but: {where}")

    def prepare(self, cell: Cell):
        self._ask({"cell": dataclasses.asdict(cell)})
        return lambda n: self._ask({"calls": n})

    def close(self):
        self._process.communicate()  # no more questions: it ends

    def _ask(self, question: dict):
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None
        assert answers is not None
        print(json.dumps(question), file=questions, flush=True)
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.site} ended")
        answer = json.loads(answer)
        if "error" in answer:
            raise NotImplementedError(answer["error"])
        return answer["done"]


def serve(questions, answers):
    """What the process of a build does: prepares the cell that it is told, then runs as many calls as it is told."""
    impl, run = Flashjax(), None
    for line in questions:
        question = json.loads(line)
        try:
            if not question:
                impl.load()
            elif "cell" in question:
                run = None  # lets go of the last cell's arrays
                cell = question["cell"] | {"lengths": tuple(question["cell"]["lengths"])}
                run = impl.prepare(Cell(**cell))
            elif run is not None:
                run(question["calls"])
            answer = {"done": impl.module.__file__}
        except Exception as error:  # the other side records it
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever is printed must not look like an answer
    serve(sys.stdin, answers)
