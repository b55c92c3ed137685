"""Not a test: the process whose children the memory's crash tests strike.

It loads the reader once.  For every path on stdin it says "child PID", and the child waits for a line; then it works, and says on
stdout what was acknowledged.  "ended CODE" follows.
"""

import os

from optmem import Engine, Memory
from optmem.errors import OptmemError

SECRET = "zq7secret0f93b1c4d5e6a7"
TURNS = 6
LINE = "the build of house {} has the number {} and a long line of words that fills the page up"


def turn(number):
    lines = [LINE.format(number, place) for place in range(9)] + ([f"the password is {SECRET}"] if number == 1 else [])
    return [{"role": "user", "content": "\n".join(lines)}, {"role": "assistant", "content": f"noted {number}"}]


def say(*words):
    os.write(1, (" ".join(words) + "\n").encode())


def work(memory):
    for number in range(TURNS):
        memory.add(turn(number))
        say("added", str(number))
        if number % 2:
            memory.context()
            say("aged")
    memory.recall("house 0 number 4")
    say("recalled")
    memory.forget(3)
    say("forgotten")


def strikeable(engine, path):
    """What a child does: nothing until it is told to, so that whoever strikes it can take hold of it."""
    os.read(0, 80)
    try:
        with Memory.open(path, engine=engine, budget=500) as opened:
            work(opened)
    except OptmemError as error:
        say("failed", type(error).__name__)


def serve():
    engine = Engine.from_pretrained("nano", device="cpu")
    while path := os.read(0, 4096).decode().strip():
        child = os.fork()
        if not child:
            strikeable(engine, path)
            os._exit(0)
        say("child", str(child))
        say("ended", str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))


if __name__ == "__main__":
    serve()
