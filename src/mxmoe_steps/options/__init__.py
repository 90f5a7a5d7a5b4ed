"""How a step gets its options: one typed class states name, type, default, unit and help of each, once.

`base` is what such a class is made of, `shared` holds what several steps ask for, and every step's own class stands in
its module. `command_line` makes a parser of a class, and the canonical text of it that the workflow's rules pass.
"""
