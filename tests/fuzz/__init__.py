"""Generated calls of every public operation, and what must hold of each: `python -m tests.fuzz`.

`cases` draws a call, `operations` and `flows` build its arguments out of `tensors`, `oracle` makes it and judges it,
`exactness` its numbers and `modes` what torch offers around it, `worker` makes many of them in a process that may die,
`shrink` makes a failing one small, `numbers` keeps the largest errors and writes the docs' page of them, and
`__main__` is the command.
"""
