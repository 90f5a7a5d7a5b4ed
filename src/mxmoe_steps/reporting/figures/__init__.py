"""The figures of the report: each function draws one and returns it as SVG text, the same every time."""
