"""The configuration: `sections` says what it holds, `loading` checks one, `points` spells out its sweep.

A section inherits from the classes of options of the steps that it is for: names, types, defaults and meanings are
those of the command lines. ``python -m mxmoe_steps.config.reference config`` writes the reference page and the JSON
schema that editors read.
"""
