"""Not a test: the process that the memory's crash tests kill.  It says on stdout what was acknowledged.

python memory_writer.py PATH
"""

import os
import sys

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


if __name__ == "__main__":
    try:
        with Memory.open(sys.argv[1], engine=Engine.from_pretrained("nano", device="cpu"), budget=500) as opened:
            work(opened)
    except OptmemError as error:
        say("failed", type(error).__name__)
