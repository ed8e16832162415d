"""From results to tables and figures: `python -m eval.report TABLE [key=value …]` (see `__main__.py`).

spec.py        what a table is to show: its `report:` block, read and checked
sources.py     results, grades, logs and the paper's numbers, read from their files
settings.py    which settings must agree before results may stand side by side
stats.py       mean and spread, corrections for many tests, best and second
paired.py      the paired test of two rows, from the grades of their runs
table.py       all of it put together: cells, marks, comparisons, footnotes
render.py      the table as Markdown, LaTeX, CSV and JSON
figures.py     dots, lines and scatter, as PNG and PDF; run_figures.py: training curves, features
"""
